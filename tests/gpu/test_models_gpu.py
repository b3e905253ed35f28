"""Whole models on a real GPU: logits and tokens bit-equal to the plain model's, however they are run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bitforbit
from bitforbit import nn as bnn
from bitforbit.integrations import autoload
from bitforbit.ops import gpu

pytest.importorskip("transformers")
autoload.autoload()

import transformers as tf  # noqa: E402

from integrations import zoo  # noqa: E402

DEVICE = "cuda"
HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None

Directories = Callable[[str], tuple[Path, Path]]


@pytest.fixture(autouse=True)
def no_errors_left() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    gpu.check_status(torch.device(DEVICE, torch.cuda.current_device()))
    gpu.clear()


def models(name: str, directories: Directories) -> tuple[Any, Any]:
    """The compressed model and the plain one, on the GPU."""
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    return auto.from_pretrained(native).to(DEVICE), auto.from_pretrained(plain).to(DEVICE)


def layouts(model: torch.nn.Module) -> set[str]:
    return {spec.layout for m in model.modules() for spec in bnn.compressed_parameters(m).values()}


def inputs(name: str, batch: int) -> dict[str, torch.Tensor]:
    return {key: value.to(DEVICE) for key, value in zoo.inputs(name, batch).items()}


def logits(model: Any, name: str, batch: int) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs(name, batch)).logits


@pytest.mark.parametrize("name", zoo.MODELS)
def test_logits(name: str, directories: Directories) -> None:
    model, plain = models(name, directories)
    assert "tiles" in layouts(model)
    for batch in (1, 8, 64):
        for _ in range(2):  # the second time, weights are decoded ahead
            assert torch.equal(logits(model, name, batch), logits(plain, name, batch)), batch


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "gpt2"])
def test_generated_tokens(name: str, batch: int, directories: Directories) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got, expected = (model.generate(**inputs(name, batch), **options) for model in models(name, directories))
    assert torch.equal(got, expected)


def decode_step(model: Any, batch: int) -> Callable[[], torch.Tensor]:
    """A step of decoding with a static cache, always at the same position and in the same memory."""
    ids = inputs("llama", batch)["input_ids"]
    length = ids.shape[1]
    cache = tf.StaticCache(config=model.config, max_cache_len=32)
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True)
    token = torch.full((batch, 1), 7, device=DEVICE)
    position = torch.full((batch, 1), length, device=DEVICE)
    # Given whole, so that nothing about it is decided on the host.
    mask = (torch.arange(32, device=DEVICE) <= length)[None, None, None].expand(batch, 1, 1, 32)

    @torch.inference_mode()
    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        output = model(token, past_key_values=cache, use_cache=True, position_ids=position, attention_mask=mask)
        return output.logits

    return step


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_in_a_cuda_graph(batch: int, directories: Directories) -> None:
    results = []
    for model in models("llama", directories):
        step = decode_step(model, batch)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        eager = step().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            with torch.inference_mode():
                captured.zero_()
            graph.replay()
            torch.cuda.synchronize()
            results.append(captured.clone())
        results.append(eager)
    assert all(torch.equal(result, results[-1]) for result in results)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, directories: Directories) -> None:
    """The same compiler for both: what it fuses may round otherwise than eager torch does."""
    if backend == "inductor":
        pytest.importorskip("triton")
    model, plain = models("llama", directories)
    got, expected = (torch.compile(each, backend=backend) for each in (model, plain))
    for batch in (1, 8):
        assert torch.equal(logits(got, "llama", batch), logits(expected, "llama", batch))


def test_generate_may_compile(directories: Directories) -> None:
    """With a static cache and ``compile=True`` generate compiles the decode step and runs it as CUDA graphs."""
    pytest.importorskip("triton")
    plain, native = directories("llama")
    tokens = []
    for directory in (native, plain):
        config = bitforbit.BitforbitConfig(compile=True) if directory == native else None
        options = {} if config is None else {"quantization_config": config}
        model = tf.AutoModelForCausalLM.from_pretrained(directory, **options).to(DEVICE)
        values = inputs("llama", 1)
        tokens.append(
            model.generate(
                **values, cache_implementation="static", max_new_tokens=8, min_new_tokens=8, do_sample=False,
                pad_token_id=0,
            )
        )  # fmt: skip
    assert torch.equal(*tokens)


def test_there_and_back(directories: Directories) -> None:
    _, native = directories("llama-tied")
    model = tf.AutoModelForCausalLM.from_pretrained(native)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(DEVICE)
    assert layouts(model) == {"tiles"}
    assert model.lm_head.tiles__weight is model.model.embed_tokens.tiles__weight
    state = model.state_dict()
    assert {name: value.device.type for name, value in state.items() if "__" in name} == {
        name: "cpu" for name in before if "__" in name
    }
    for values in (state, model.to("cpu").state_dict()):
        assert values.keys() == before.keys()
        assert all(torch.equal(values[name].cpu(), before[name]) for name in before)
    assert layouts(model) == {"planes"}


def test_saved(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    model, _ = models("llama", directories)
    model.save_pretrained(tmp_path / "saved")
    bitforbit.decompress(tmp_path / "saved", tmp_path / "restored")
    assert (tmp_path / "restored/model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_compressed_on_the_gpu(directories: Directories) -> None:
    plain, native = directories("mixtral")
    model = bitforbit.compress_model(tf.AutoModelForCausalLM.from_pretrained(plain).to(DEVICE))
    expected = tf.AutoModelForCausalLM.from_pretrained(native).state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name].cpu(), value) for name, value in expected.items())


def test_units_of_dfloat11(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    bitforbit.compress(plain, tmp_path / "df11", format="df11")
    config = bitforbit.BitforbitConfig(runtime="df11")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "df11", quantization_config=config).to(DEVICE)
    assert layouts(model) == {"df11"}
    reference = tf.AutoModelForCausalLM.from_pretrained(plain).to(DEVICE)
    for batch in (1, 8, 64):
        assert torch.equal(logits(model, "llama", batch), logits(reference, "llama", batch))


def test_other_dtypes_run_from_planes(directories: Directories, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        plain = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[0], dtype=dtype).to(DEVICE)
        model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[0], dtype=dtype).to(DEVICE)
        bitforbit.compress_model(model)
        assert layouts(model) == {"planes"}
        assert torch.equal(logits(model, "llama", 8), logits(plain, "llama", 8))


@pytest.mark.skipif(not HAS_ACCELERATE, reason="device_map needs accelerate")
@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_device_map(device_map: str, directories: Directories) -> None:
    plain, native = directories("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(native, device_map=device_map)
    assert layouts(model) == {"tiles"}
    reference = tf.AutoModelForCausalLM.from_pretrained(plain, device_map=device_map)
    assert torch.equal(logits(model, "llama", 8), logits(reference, "llama", 8))


@pytest.mark.skipif(not HAS_ACCELERATE, reason="device_map needs accelerate")
def test_offloaded_modules_decode_on_the_gpu(directories: Directories, tmp_path: Path) -> None:
    plain, native = directories("llama")
    device_map = {
        "model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": 0, "model.norm": 0,
        "model.rotary_emb": 0, "lm_head": "disk",
    }  # fmt: skip
    options: dict[str, Any] = {"device_map": device_map, "offload_folder": str(tmp_path)}
    model = tf.AutoModelForCausalLM.from_pretrained(native, **options)
    assert layouts(model) == {"tiles", "planes"}
    reference = tf.AutoModelForCausalLM.from_pretrained(plain).to(DEVICE)
    for _ in range(2):
        assert torch.equal(logits(model, "llama", 8), logits(reference, "llama", 8))


def test_memory_while_loading(tmp_path: Path) -> None:
    """The peak of moving to the GPU is the compressed model and little more than one matrix in BF16."""
    config = tf.LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    plain = tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    plain_bytes = sum(2 * p.numel() for p in plain.parameters())
    model = bitforbit.compress_model(plain)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.to(DEVICE)
    peak = torch.cuda.max_memory_allocated() - before
    size = torch.cuda.memory_allocated() - before
    largest = 8192 * 1024 * 2
    assert size < 0.73 * plain_bytes
    assert peak < size + 3 * largest


def test_bench(directories: Directories, capsys: pytest.CaptureFixture[str]) -> None:
    from bitforbit.cli import main

    _, native = directories("llama")
    sizes = ["--tokens", "4", "--prompt-tokens", "5", "--rounds", "1", "--mode", "exact"]
    assert main(["bench", str(native), *sizes, "--device", DEVICE, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["exact"], value["device"]) == (True, DEVICE)
    plain, exact = value["variants"]
    assert 0 < exact["weight_bytes"] < plain["weight_bytes"]
    assert exact["gpu_running_peak"] > 0
