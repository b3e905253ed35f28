"""What two processes do together for test_tensor_parallel.py: one case after the other, until one fails.

    tensor_parallel_cases.py RANK FOLDER

Each process writes ``FOLDER/RANK.json``: case -> "" or the traceback.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.tensor import DTensor

import bitforbit
from bitforbit import BitforbitConfig, errors
from bitforbit.integrations import autoload
from bitforbit.nn import compressed_parameters, compressed_size
from integrations import zoo
from integrations.tensor_parallel_models import DENSE, EXPERTS, OLD, write_damaged, write_models

CASES: dict[str, Callable[[Path], None]] = {}
SECONDS = 60
"""How long a process waits for another one."""


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Register a case under its name."""
    CASES[function.__name__.replace("_", " ")] = function
    return function


def load(folder: Path, **kwargs: Any) -> Any:
    """A model split over both processes."""
    return tf.AutoModelForCausalLM.from_pretrained(folder, **{"tp_plan": "auto", **kwargs})


def results(model: Any) -> tuple[torch.Tensor, ...]:
    """What a model computes: logits of one and of two prompts, and what it generates."""
    return *(zoo.logits(model, "text", batch) for batch in (1, 2)), zoo.generated(model, "text", 2)


def same(model: Any, plain: Any) -> None:
    """Assert that two models compute the same bits."""
    for got, expected in zip(results(model), results(plain), strict=True):
        assert torch.equal(got, expected), (got - expected).abs().max()


def split_names(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts of compressed parameters by name."""
    return {
        f"{prefix}.{name}": spec.shape
        for prefix, module in model.named_modules()
        for name, spec in compressed_parameters(module).items()
    }


def raises(kind: type[Exception], *words: str, call: Callable[[], object]) -> None:
    """Assert that a call raises an error of this very kind with these words in it."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.type is kind
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- the cases -----------------------------------------------------------------------------------------------


@case
def dense_models_compute_the_same_bits(folder: Path) -> None:
    for name in DENSE:
        plain = load(folder / name / "plain")
        same(load(folder / name / "native"), plain)
        same(load(folder / name / "plain", quantization_config=BitforbitConfig()), plain)


@case
def models_of_experts_compute_the_same_bits(folder: Path) -> None:
    for name in EXPERTS:
        plain = load(folder / name / "plain")
        same(load(folder / name / "native"), plain)
        same(load(folder / name / "plain", quantization_config=BitforbitConfig()), plain)


@case
def experts_by_process_compute_the_same_bits(folder: Path) -> None:
    config = {"tp_size": 2, **({"enable_expert_parallel": True} if OLD else {"ep_size": 2})}
    for name in ("mixtral", "qwen3-moe", "gpt-oss"):
        kwargs = {"tp_plan": None, "distributed_config": config}
        plain, model = load(folder / name / "plain", **kwargs), load(folder / name / "native", **kwargs)
        same(model, plain)
        shapes = split_names(model)
        assert shapes["model.layers.0.mlp.experts.down_proj"][0] == 2


@case
def every_process_holds_its_parts_only(folder: Path) -> None:
    model = load(folder / "llama" / "native")
    shapes = split_names(model)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (64, 128)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (128, 96)
    assert shapes["lm_head.weight"] == (128, 128)
    assert not any(isinstance(p, DTensor) for p in model.parameters())


@case
def peak_memory_is_that_of_the_parts(folder: Path) -> None:
    whole = compressed_size(tf.AutoModelForCausalLM.from_pretrained(folder / "large" / "native")).nbytes
    before = reset_peak()
    model = load(folder / "large" / "native")
    parts, grown = compressed_size(model).nbytes, resident("VmHWM") - before
    print(f"rank {dist.get_rank()}: whole {whole}, parts {parts}, peak growth {grown}", file=sys.stderr)
    # Older releases leave embeddings whole, if they are not tied.
    assert parts < (0.65 if OLD else 0.52) * whole
    largest = model.config.vocab_size * model.config.hidden_size * 2 // (1 if OLD else 2)
    assert grown < parts + 1.6 * largest


@case
def gradients_may_be_on(folder: Path) -> None:
    for name in ("llama", "llama-tied", "mixtral"):
        plain, model = load(folder / name / "plain"), load(folder / name / "native")
        values = zoo.inputs("text", 2)
        assert torch.equal(model(**values).logits, plain(**values).logits)


@case
def fused_mode_runs(folder: Path) -> None:
    model = load(folder / "llama" / "native", quantization_config=BitforbitConfig(mode="fused"))
    expected = zoo.logits(load(folder / "llama" / "plain"), "text", 2)
    torch.testing.assert_close(zoo.logits(model, "text", 2), expected, rtol=0.05, atol=0.05)


@case
def quantized_caches_hold_local_heads(folder: Path) -> None:
    for name in ("llama", "qwen3"):
        plain, model = load(folder / name / "plain"), load(folder / name / "native")
        caches = [bitforbit.kivi_cache(each, residual=32) for each in (plain, model)]
        tokens = [
            each.generate(**zoo.inputs("text", 2), max_new_tokens=40, do_sample=False, past_key_values=cache)
            for each, cache in zip((plain, model), caches, strict=True)
        ]
        assert torch.equal(*tokens)


@case
def modules_that_are_not_converted_stay_split(folder: Path) -> None:
    config = BitforbitConfig(modules_to_not_convert=["lm_head", "layers.0"])
    model = load(folder / "llama" / "native", quantization_config=config)
    assert isinstance(model.lm_head.weight, DTensor)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    same(model, load(folder / "llama" / "plain"))


@case
def saving_writes_the_whole_model(folder: Path) -> None:
    for name in ("llama-bias", "qwen3", "mixtral", "qwen3-moe"):
        model = load(folder / name / "native")
        model.save_pretrained(folder / name / "saved", is_main_process=dist.get_rank() == 0)
        if dist.get_rank() == 0:
            one = tf.AutoModelForCausalLM.from_pretrained(folder / name / "native")
            one.save_pretrained(folder / name / "expected")
            contents = [
                {path.name: path.read_bytes() for path in sorted((folder / name / which).iterdir())}
                for which in ("saved", "expected")
            ]
            assert contents[0].keys() == contents[1].keys()
            assert [key for key in contents[0] if contents[0][key] != contents[1][key]] == []
        dist.barrier()


@case
def saving_fails_in_every_process(folder: Path) -> None:
    model = load(folder / "llama" / "native")
    (folder / "a file").touch()
    first = dist.get_rank() == 0
    kind = errors.UsageError if first else errors.WorkerError
    raises(kind, "got a file" if first else "process 0", call=lambda: model.save_pretrained(folder / "a file"))


@case
def decompressed_models_are_split_as_before(folder: Path) -> None:
    for name in ("llama-tied", "mixtral"):
        model, plain = load(folder / name / "native"), load(folder / name / "plain")
        bitforbit.decompress_model(model)
        assert isinstance(model.lm_head.weight, DTensor)
        same(model, plain)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name == "llama-tied")
        files = []
        for which, each in (("again", model), ("as plain", plain)):
            each.save_pretrained(folder / name / which)
            files.append((folder / name / which / "model.safetensors").read_bytes())
        assert files[0] == files[1]
    plain = load(folder / "llama" / "plain")
    raises(errors.UsageError, "quantization_config", call=lambda: bitforbit.compress_model(plain))


@case
def damage_is_found_once_and_told_to_all(folder: Path) -> None:
    kinds = []
    for tensor in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        with pytest.raises((errors.ChecksumError, errors.ModelLoadError), match=tensor) as caught:
            load(folder / "damaged" / tensor)
        kinds.append(caught.type.__name__)
    found: list[Any] = [None, None]
    dist.all_gather_object(found, kinds)
    assert all(sorted(pair) == ["ChecksumError", "ModelLoadError"] for pair in zip(*found, strict=True)), found
    load(folder / "damaged" / tensor, quantization_config=BitforbitConfig(verify=False))


@case
def what_cannot_be_split_is_refused(folder: Path) -> None:
    native = folder / "llama" / "native"
    raises(
        errors.UsageError, "num_key_value_heads, which is 1", "got 2", "none",
        call=lambda: load(folder / "llama-one-head" / "native"),
    )  # fmt: skip
    data = {"tp_plan": None, "distributed_config": {"fsdp_size": 2}}
    raises(errors.UsageError, "fsdp_size=2", "vLLM", call=lambda: load(native, **data))
    raises(errors.UsageError, "DFloat11", call=lambda: load(folder / "df11"))
    if not OLD:
        given = {"tp_plan": None, "distributed_config": {"tp_plan": {"model.embed_tokens": "embedding_colwise"}}}
        raises(errors.UsageError, "tied", "vLLM", call=lambda: load(folder / "llama-tied" / "native", **given))
    plan = {"model.layers.*.mlp": "sequence_parallel", "model.layers.*.mlp.up_proj": "sequence_parallel"}
    sequence = {"tp_plan": None, "distributed_config": {"tp_size": 2, "tp_plan": plan}}
    raises(errors.UsageError, "up_proj", "'sequence_parallel'", "vLLM", call=lambda: load(native, **sequence))


@case
def a_process_dies(folder: Path) -> None:
    model = load(folder / "llama" / "native")
    if dist.get_rank() == 1:
        write_results(folder)
        os._exit(7)
    with pytest.raises(RuntimeError, match=r"onnection|imed out"):
        results(model)


# --- around them ---------------------------------------------------------------------------------------------


def resident(key: str) -> int:
    """Resident bytes now (VmRSS) or at most since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def reset_peak() -> int:
    """Forget the peak; returns the resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


NAMES = tuple(CASES)

outcomes: dict[str, str] = {}


def write_results(folder: Path) -> None:
    """For the test."""
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))


def main(rank: int, folder: Path) -> None:
    """Run all cases."""
    autoload.autoload()
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    write_models(folder, rank)  # before the group is there: in one, process 0 alone writes
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=SECONDS), world_size=2, rank=rank)
    dist.barrier()
    if rank == 0:
        write_damaged(folder)
    dist.barrier()
    for name, function in CASES.items():
        try:
            outcomes[name] = ""
            start = time.monotonic()
            function(folder)
            print(f"rank {rank}: {name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
        except BaseException:  # noqa: BLE001  # pytest's failures are none of Exception
            outcomes[name] = traceback.format_exc()
            break
    write_results(folder)
    os._exit(0)  # the group may be broken: nothing is left to be said in it


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
