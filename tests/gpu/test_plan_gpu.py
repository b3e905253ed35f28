"""Planned peaks against what torch's allocator held on a GPU while a model generated."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bitforbit
from bitforbit.integrations import autoload
from bitforbit.kv.spec import KiviSpec
from bitforbit.planner import KvSetting, Load, Memory, Request, find_gpu, read_shape
from bitforbit.planner.request import peak, stages_of

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
autoload.autoload()

import transformers as tf  # noqa: E402

TOLERANCE = 0.08
LIBRARIES_BYTES = 80 << 20
"""What cuBLAS, SDPA and the kernels here keep for themselves, and the allocator's rounding."""


@dataclass(frozen=True)
class Case:
    """How a model runs; tokens of the prompt and new ones."""

    method: str
    bits: int | None
    batch: int
    prompt: int
    new: int = 8


CASES = [
    Case("bf16", None, 4, 2000),
    Case("bf16", 4, 4, 2000),
    Case("exact", None, 4, 2000),
    Case("fused", None, 1, 24),
    Case("fused", 4, 4, 2000),
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A plain Llama of about 0.7 GB and the same compressed: large beside what the libraries keep."""
    root = tmp_path_factory.mktemp("planned")
    config = tf.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(root / "plain")
    bitforbit.compress(root / "plain", root / "native")
    return {False: root / "plain", True: root / "native"}


def measured(path: Path, case: Case) -> int:
    """Peak bytes of torch's allocator beyond what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    options: dict[str, Any] = {}
    if case.method != "bf16":
        options["quantization_config"] = bitforbit.BitforbitConfig(mode=case.method)
    model = tf.AutoModelForCausalLM.from_pretrained(path, device_map="cuda", **options).eval()
    ids = torch.randint(1, 32000, (case.batch, case.prompt), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    cache = bitforbit.kivi_cache(model, k_bits=case.bits, v_bits=case.bits) if case.bits else None
    with torch.no_grad():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new, do_sample=False, eos_token_id=None,
            pad_token_id=0, past_key_values=cache,
        )  # fmt: skip
    return int(torch.cuda.max_memory_allocated() - before)


def planned(path: Path, case: Case) -> Memory:
    """What the plan says; the size of the GPU does not enter it."""
    kv = KvSetting(str(case.bits), KiviSpec(case.bits, case.bits, sink=4) if case.bits else None)
    stages = stages_of(Request(read_shape(path), find_gpu("80GiB")), case.method, kv)
    context = case.prompt + case.new
    return peak(stages, Load(context, case.batch, context))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.method}-kv{c.bits}-{c.batch}x{c.prompt}")
def test_peak(case: Case, directories: dict[bool, Path]) -> None:
    path = directories[case.method != "bf16"]
    plan, found = planned(path, case), measured(path, case)
    print(f"{plan.total / 1e6:.1f} planned, {found / 1e6:.1f} measured, {plan}")
    assert plan.total == pytest.approx(found, rel=TOLERANCE, abs=LIBRARIES_BYTES)
