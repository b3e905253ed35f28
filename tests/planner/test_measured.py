"""Planned peaks against measured ones: small models that generate on this CPU.

Measured: bytes of the model's parameters, the largest sum of what torch's allocator holds beside them while generating
(its profiler sees every allocation), and the scratch memory of decoded weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import bitforbit
from bitforbit.kv.spec import KiviSpec
from bitforbit.planner import KvSetting, Load, Memory, Request, find_gpu, read_shape
from bitforbit.planner.request import peak, stages_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 0.08
"""Of all memory; of what is beside the weights: twice as much, and 0.1 MB."""

_COMMON = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4000, "max_position_embeddings": 8192,
}  # fmt: skip
_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 256, "query_pre_attn_scalar": 64},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "phi": {"num_key_value_heads": 4, "head_dim": None},
}


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    bits: int | None
    batch: int
    prompt: int
    new: int
    chunk: int | None = None


CASES = [
    Case("llama", "bf16", None, 2, 600, 8),
    Case("llama", "bf16", 2, 2, 600, 8),
    Case("llama", "bf16", None, 3, 1100, 4, chunk=100),
    Case("llama", "bf16", 4, 3, 1100, 4, chunk=100),
    Case("llama", "exact", None, 2, 600, 8),
    Case("llama", "fused", 4, 1, 300, 8),
    Case("llama", "fused", None, 1, 24, 8),
    Case("gemma2", "bf16", None, 2, 600, 8),
    Case("gemma2", "fused", 4, 2, 600, 8),
    Case("qwen3_moe", "bf16", None, 2, 600, 8),
    Case("phi", "bf16", None, 2, 600, 8),
    Case("phi", "exact", 8, 2, 600, 8),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[bool, Path]]:
    """Of each family a plain model and the same compressed."""
    root = tmp_path_factory.mktemp("models")
    found: dict[str, dict[bool, Path]] = {}
    for family, changes in _MODELS.items():
        torch.manual_seed(0)
        fields = {name: value for name, value in {**_COMMON, **changes}.items() if value is not None}
        config = transformers.AutoConfig.for_model(family, **fields)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain = root / family
        model.save_pretrained(plain)
        bitforbit.compress(plain, root / f"{family}-coded")
        found[family] = {False: plain, True: root / f"{family}-coded"}
    return found


def measured(path: Path, case: Case) -> int:
    """Peak bytes of a process' tensors while it generates."""
    from torch.profiler import ProfilerActivity, profile

    from bitforbit import BitforbitConfig  # makes itself known to transformers
    from bitforbit.nn import set_mode
    from bitforbit.ops.scratch import SCRATCH

    # Newer versions of transformers compute capped logits so by default, older ones leave the cap out (SDPA).
    how = {"attn_implementation": "eager"} if case.family == "gemma2" and not case.bits else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **how).eval()
    quantized = isinstance(getattr(model.config, "quantization_config", None), BitforbitConfig)
    assert quantized == (case.method != "bf16")
    if case.method == "fused":
        set_mode(model, "fused")
    SCRATCH.clear()
    ids = torch.randint(1, 4000, (case.batch, case.prompt))
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if case.bits:
        options["past_key_values"] = bitforbit.kivi_cache(model, k_bits=case.bits, v_bits=case.bits)
    if case.chunk:
        options["prefill_chunk_size"] = case.chunk
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new, **options)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return int(sum(weights.values()) + most + SCRATCH.kept_bytes)


def planned(path: Path, case: Case) -> Memory:
    kv = KvSetting(str(case.bits), KiviSpec(case.bits, case.bits, sink=4) if case.bits else None)
    stages = stages_of(Request(read_shape(path), find_gpu("CPU")), case.method, kv)
    context = case.prompt + case.new
    return peak(stages, Load(context, case.batch, case.chunk or context))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.method}-kv{c.bits}-{c.batch}x{c.prompt}")
def test_peak(case: Case, directories: dict[str, dict[bool, Path]]) -> None:
    path = directories[case.family][case.method != "bf16"]
    plan, found = planned(path, case), measured(path, case)
    print(f"{plan.total / 1e6:.2f} planned, {found / 1e6:.2f} measured, {plan}")
    assert plan.total == pytest.approx(found, rel=TOLERANCE)
    assert plan.total - plan.weights == pytest.approx(found - plan.weights, rel=2 * TOLERANCE, abs=1e5)
