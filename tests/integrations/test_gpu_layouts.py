"""Models whose weights are in layouts for GPUs, on CPU tensors through the emulation of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import bitforbit
from bitforbit import BitforbitConfig, errors
from bitforbit import nn as bnn
from bitforbit.nn import layout
from bitforbit.ops import gpu, stats
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from integrations import zoo
from integrations.conftest import Directories
from integrations.test_models import assert_same_files

# The emulation is slow: what does not depend on the architecture is tried with few.
SAVED = ("llama-tied", "mixtral", "gpt2")
GENERATING = ("llama", "mixtral")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedLauncher]:
    """The CPU is treated as a GPU."""
    monkeypatch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")
    launcher = EmulatedLauncher(1)
    with gpu.emulate(EmulatedQueue(launcher)):
        yield launcher
        gpu.clear()


def layouts(model: torch.nn.Module) -> set[str]:
    return {spec.layout for m in model.modules() for spec in bnn.compressed_parameters(m).values()}


def assert_same_outputs(model: Any, plain: Path, name: str, *batches: int) -> None:
    reference = zoo.auto_class(name).from_pretrained(plain)
    for batch in batches:
        assert torch.equal(zoo.logits(model, name, batch), zoo.logits(reference, name, batch)), batch


def decode_logits(model: Any, name: str, batch: int) -> torch.Tensor:
    """Logits of a prompt's last token and of the steps after it."""
    out = model.generate(
        **zoo.inputs(name, batch), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


def assert_saved(model: Any, plain: Path, directory: Path) -> None:
    model.save_pretrained(directory / "saved")
    bitforbit.decompress(directory / "saved", directory / "restored")
    assert_same_files(plain, directory / "restored")


def df11_of(plain: Path, directory: Path) -> Path:
    bitforbit.compress(plain, directory, format="df11", threads=1)
    return directory


@pytest.mark.parametrize("name", zoo.MODELS)
def test_tiles(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    model = zoo.auto_class(name).from_pretrained(native, quantization_config=BitforbitConfig(runtime="tiles"))
    assert layouts(model) >= {"tiles"}
    assert_same_outputs(model, plain, name, 2)
    if name in GENERATING:
        reference = zoo.auto_class(name).from_pretrained(plain)
        for batch in (1, 8):
            assert torch.equal(decode_logits(model, name, batch), decode_logits(reference, name, batch))
    if name in SAVED:
        assert_saved(model, plain, tmp_path)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_batches(batch: int, directories: Directories, emulated: EmulatedLauncher) -> None:
    plain, native = directories("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(native)
    before = len(emulated.launches)
    assert_same_outputs(model, plain, "llama", batch)
    kernels = [kernel for kernel, _ in emulated.launches[before:]]
    assert len(kernels) == 16  # 2 layers of 7 linears, the head, the rows of the embedding


def test_fp16(tmp_path: Path) -> None:
    """A checkpoint in FP16: exact outputs and files, and fused products as close as FP16 is."""
    plain, native = tmp_path / "plain", tmp_path / "native"
    zoo.write("llama", plain, torch.float16)
    bitforbit.compress(plain, native)
    model = tf.AutoModelForCausalLM.from_pretrained(native, quantization_config=BitforbitConfig(runtime="tiles"))
    assert model.dtype == torch.float16
    assert layouts(model) == {"tiles"}
    assert_same_outputs(model, plain, "llama", 1, 8)
    assert_saved(model, plain, tmp_path)
    quick = tf.AutoModelForCausalLM.from_pretrained(
        native, quantization_config=BitforbitConfig(runtime="tiles", mode="fused")
    )
    stats.reset()
    got, expected = zoo.logits(quick, "llama", 1), zoo.logits(model, "llama", 1)
    assert stats.snapshot()["fused"].linears
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_compressed_on_the_gpu_while_loading(name: str, directories: Directories) -> None:
    plain, native = directories(name)
    model = zoo.auto_class(name).from_pretrained(plain, quantization_config=BitforbitConfig())
    assert layouts(model) >= {"tiles"}
    assert_same_outputs(model, plain, name, 1)
    expected = zoo.auto_class(name).from_pretrained(native).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llava"])
def test_units_of_dfloat11(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories(name)
    df11 = df11_of(plain, tmp_path / "df11")
    model = zoo.auto_class(name).from_pretrained(df11, quantization_config=BitforbitConfig(runtime="df11"))
    assert layouts(model) >= {"df11"}
    assert_same_outputs(model, plain, name, 1, 8)
    if name in SAVED:
        assert_saved(model, plain, tmp_path)


def test_matrices_of_a_unit_share_its_parts(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    df11 = df11_of(plain, tmp_path / "df11")
    model = tf.AutoModelForCausalLM.from_pretrained(df11, quantization_config=BitforbitConfig(runtime="df11"))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.stream__weight is mlp.down_proj.stream__weight
    assert attention.q_proj.stream__weight is not model.model.layers[1].self_attn.q_proj.stream__weight
    sizes = bnn.compressed_size(model)
    weights = sum(p.numel() for p in tf.AutoModelForCausalLM.from_pretrained(plain).parameters() if p.dim() > 1)
    assert (sizes.compressed_elements, sizes.original_nbytes) == (weights, 2 * weights)
    bnn.set_layout(model, "tiles")
    assert layouts(model) == {"tiles"}
    assert_same_outputs(model, plain, "llama", 1)


@pytest.mark.parametrize(("runtime", "expected"), [("auto", "tiles"), ("planes", "planes")])
def test_dfloat11_transcoded(runtime: str, expected: str, directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    df11 = df11_of(plain, tmp_path / "df11")
    model = tf.AutoModelForCausalLM.from_pretrained(df11, quantization_config=BitforbitConfig(runtime=runtime))
    assert layouts(model) == {expected}
    assert_same_outputs(model, plain, "llama", 1)


def test_some_modules_of_a_unit_plain(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    df11 = df11_of(plain, tmp_path / "df11")
    config = BitforbitConfig(runtime="df11", modules_to_not_convert=["up_proj", "layers.1"])
    model = tf.AutoModelForCausalLM.from_pretrained(df11, quantization_config=config)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert layouts(model) == {"df11"}
    assert_same_outputs(model, plain, "llama", 1)


def test_a_damaged_unit(directories: Directories, tmp_path: Path) -> None:
    from integrations.test_refusals import flip

    df11 = df11_of(directories("llama")[0], tmp_path / "df11")
    flip(df11 / "model_layers_1.safetensors", "model.layers.1.luts")
    with pytest.raises(errors.FormatError):
        tf.AutoModelForCausalLM.from_pretrained(df11, quantization_config=BitforbitConfig(runtime="df11"))


def test_dequantized(directories: Directories) -> None:
    plain, native = directories("llama-tied")
    model = tf.AutoModelForCausalLM.from_pretrained(native).dequantize()
    reference = tf.AutoModelForCausalLM.from_pretrained(plain)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in reference.named_modules()}
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_ties_after_moves(directories: Directories, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ties go by the names of parts, which change with the layout."""
    plain, native = directories("llama-tied")
    with monkeypatch.context() as patch:
        patch.setattr(layout, "is_gpu", lambda device: False)
        model = tf.AutoModelForCausalLM.from_pretrained(native)
    model.to("cpu")
    assert layouts(model) == {"tiles"}
    model.tie_weights()
    assert model.lm_head.tiles__weight is model.model.embed_tokens.tiles__weight
    assert_saved(model, plain, tmp_path)


def test_offloaded_modules_stay_planes(directories: Directories, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from integrations.test_offload import maps

    plain, native = directories("llama")
    options: dict[str, Any] = {"device_map": maps("llama"), "offload_folder": str(tmp_path)}
    model = tf.AutoModelForCausalLM.from_pretrained(native, **options)
    specs = {name: bnn.compressed_parameters(module) for name, module in model.named_modules()}
    assert specs["lm_head"]["weight"].layout == specs["model.layers.0.mlp.up_proj"]["weight"].layout == "planes"
    assert specs["model.layers.1.mlp.up_proj"]["weight"].layout == "tiles"
    assert_same_outputs(model, plain, "llama", 2)


def test_lora(directories: Directories) -> None:
    peft = pytest.importorskip("peft")
    plain, native = directories("llama")
    losses = []
    for directory in (plain, native):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_pretrained(directory)
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        )
        ids = zoo.inputs("llama", 2)["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        losses.append([loss.detach(), *grads])
    assert len(losses[0]) == 1 + 2 * 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_compile_is_asked_for() -> None:
    for compiled in (False, True):
        quantizer = tf.quantizers.auto.AutoHfQuantizer.from_config(BitforbitConfig(compile=compiled))
        assert quantizer.is_compileable is compiled


def test_saving_an_adapter_converts_nothing(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1])
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with monkeypatch.context() as patch:
        patch.setattr(layout, "converted", None)
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "model.norm.weight" in model.state_dict()
    assert any(name.endswith("code__weight") for name in model.state_dict())


def test_official_files_of_dfloat11() -> None:
    official = Path(__file__).parents[1] / "data" / "df11-official" / "llama_dir"
    config = BitforbitConfig(runtime="df11")
    model = tf.AutoModelForCausalLM.from_pretrained(official / "df11", quantization_config=config)
    assert layouts(model) == {"df11"}
    reference = tf.AutoModelForCausalLM.from_pretrained(official / "bf16")
    for batch in (1, 8):
        assert torch.equal(zoo.logits(model, "llama", batch), zoo.logits(reference, "llama", batch))


# --- mode fused -----------------------------------------------------------------------------------------------------

FUSED = BitforbitConfig(mode="fused")
FUSED_LAUNCHES = {
    "llama": [15, 9], "llama-tied": [15, 9], "qwen3": [15, 9], "gemma3": [15, 9], "mistral": [15, 9],
    "mixtral": [9, 5], "gpt2": [1, 1], "bert": [14, 10], "llava": [29, 19], "qwen2-vl": [25, 19],
}  # fmt: skip
"""In the first pass, and in those after it: q, k and v, gate and up in one each."""


def fused_launches(launcher: EmulatedLauncher) -> int:
    count = sum(kernel == "fused_linear" for kernel, _ in launcher.launches)
    launcher.launches.clear()
    return count


@pytest.mark.parametrize("name", zoo.MODELS)
def test_fused(name: str, directories: Directories, emulated: EmulatedLauncher) -> None:
    """Close to the plain model; the same bits with siblings multiplied together and alone."""
    plain, native = directories(name)
    model = zoo.auto_class(name).from_pretrained(native, quantization_config=FUSED)
    reference = zoo.logits(zoo.auto_class(name).from_pretrained(plain), name, 2).float()
    with gpu.use_policy(gpu.Policy(grouped=False)):
        alone = zoo.logits(model, name, 2)
    launches = []
    for _ in range(2):
        emulated.launches.clear()
        assert torch.equal(zoo.logits(model, name, 2), alone)
        launches.append(fused_launches(emulated))
    assert (alone.float() - reference).norm() / reference.norm() < 0.02
    assert launches == FUSED_LAUNCHES[name]


def test_fused_in_any_company(directories: Directories) -> None:
    """A sequence's logits do not depend on those beside it, as far as torch's own operators keep to that."""
    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1], quantization_config=FUSED)
    ids = zoo.inputs("llama", 5)["input_ids"]
    with torch.no_grad():
        for _ in range(2):
            together = model(ids).logits
            for i in range(5):
                assert torch.equal(model(ids[i : i + 1]).logits, together[i : i + 1])


@pytest.mark.parametrize("name", GENERATING)
def test_fused_generates(name: str, directories: Directories) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(directories(name)[1], quantization_config=FUSED)
    stats.reset()
    first, second = (decode_logits(model, name, 2) for _ in range(2))
    assert torch.equal(first, second)
    counts = stats.snapshot()
    assert (counts["decoded"].linears, counts["fused"].linears) == (0, 2 * 3 * (15 if name == "llama" else 9))
    with gpu.use_policy(gpu.Policy(grouped=False)):
        assert torch.equal(decode_logits(model, name, 2), first)


def test_fused_with_adapters(directories: Directories, emulated: EmulatedLauncher) -> None:
    """Adapters ask the compressed linear below them, which still knows its siblings."""
    peft = pytest.importorskip("peft")
    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1], quantization_config=FUSED)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    ids = zoo.inputs("llama", 2)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    with torch.no_grad(), gpu.use_policy(gpu.Policy(grouped=False)):
        expected = model(ids).logits
    with torch.no_grad():
        for launches in (13, 9):  # before the first adapter nothing needs gradients: those linears are known by now
            fused_launches(emulated)
            assert torch.equal(model(ids).logits, expected)
            assert fused_launches(emulated) == launches


def test_fused_where_some_is_offloaded(directories: Directories, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from integrations.test_offload import maps

    native = directories("llama")[1]
    options: dict[str, Any] = {"device_map": maps("llama"), "offload_folder": str(tmp_path)}
    model = tf.AutoModelForCausalLM.from_pretrained(native, quantization_config=FUSED, **options)
    expected = zoo.logits(model, "llama", 2)
    for _ in range(2):
        assert torch.equal(zoo.logits(model, "llama", 2), expected)


def test_compressed_in_memory_has_siblings(directories: Directories, emulated: EmulatedLauncher) -> None:
    plain, native = directories("llama")
    loaded = tf.AutoModelForCausalLM.from_pretrained(native, quantization_config=FUSED)
    model = bitforbit.compress_model(tf.AutoModelForCausalLM.from_pretrained(plain), mode="fused")
    for _ in range(2):
        assert torch.equal(zoo.logits(model, "llama", 2), zoo.logits(loaded, "llama", 2))
