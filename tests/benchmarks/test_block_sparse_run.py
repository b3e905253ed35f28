"""The benchmarks of attention, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import block_sparse, gpu_attention


def test_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(block_sparse, "BLOCK", 32)
    monkeypatch.setattr(block_sparse, "GATE_TOKENS", 130)
    result = block_sparse.run((256,), rounds=1, keep=False)
    kept = {(case["pattern"], case["density"]): case["kept"] for case in result["cases"]}
    assert len(kept) == 1 + 3 * len(block_sparse.PATTERNS)
    assert kept["topk", 0.25] < kept["topk", 0.5] < kept["dense", 1.0] == 1
    assert capsys.readouterr().out.count("butterfly") == 3


def test_a_gate_that_is_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "BLOCK", 32)
    monkeypatch.setattr(block_sparse, "GATE_TOKENS", 130)
    right = block_sparse.block_sparse.attention
    monkeypatch.setattr(block_sparse.block_sparse, "attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    with pytest.raises(AssertionError, match=r"local_global at density 1\.0: outputs are off by"):
        block_sparse.gate(block_sparse.torch.bfloat16)


def test_the_step_of_make_gpu(tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    assert gpu_attention.main(["--dry-run", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert {"gpt2", "memory", "sparse", "errors"} <= set(result)
    assert not result["errors"]
    assert all(case["us"] is None for case in result["sparse"])
