"""Verdicts in memory and on disk, and checks while running."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from bitforbit.cpu.linear import Order
from bitforbit.errors import OrderMismatchError, UsageError
from bitforbit.ops import probe, proven, proven_cache

PRODUCT = (64, 256, 2, 1, False)
ORDER = Order("vdpbf16", 64)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, ...]]:
    """A fresh cache, a probe that finds ORDER for even numbers of tokens, and what it was asked."""
    calls: list[tuple[object, ...]] = []

    def find_order(linear: object, *product: object) -> Order | None:
        calls.append(product[:5])
        return None if int(str(product[2])) % 2 else ORDER

    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITFORBIT_PARANOID", raising=False)
    monkeypatch.setattr(probe, "find_order", find_order)
    monkeypatch.setattr(proven, "FAST_ON", frozenset({"scalar", "avx2", "avx512", "avx512_vbmi2", "avx512_bf16"}))
    proven.clear()
    yield calls
    proven.clear()


def lookup(rows: int = 64, cols: int = 256, tokens: int = 2, threads: int = 1, has_bias: bool = False) -> Order | None:
    return proven.lookup(rows, cols, tokens, threads, has_bias, torch.bfloat16)


def test_probed_once(probed: list[object]) -> None:
    for _ in range(3):
        assert lookup() == ORDER
        assert lookup(tokens=3) is None
    assert probed == [PRODUCT, (64, 256, 3, 1, False)]


def test_every_part_of_the_key_counts(probed: list[object]) -> None:
    lookup()
    for other in ({"rows": 80}, {"cols": 320}, {"tokens": 4}, {"threads": 2}, {"has_bias": True}):
        lookup(**other)
    assert len(probed) == 6


def test_a_new_process_reads_the_verdicts(probed: list[object]) -> None:
    lookup(), lookup(tokens=3)
    proven.clear()
    assert lookup() == ORDER
    assert lookup(tokens=3) is None
    assert len(probed) == 2


def test_limits(probed: list[object]) -> None:
    assert proven.lookup(64, 256, 2, 1, False, torch.float32) is None
    assert proven.lookup(64, 256, 2, 1, False, torch.float16) is None
    assert lookup(tokens=17) is None
    assert lookup(tokens=0) is None
    assert lookup(rows=8) is None
    assert lookup(cols=32) is None
    assert not probed


def test_nothing_is_probed_where_no_kernel_is_fast(probed: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "FAST_ON", frozenset())
    assert lookup() is None
    assert not probed
    assert not proven_cache.path().exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100000,
        b'{"version": 1, "environment": {}, "verdicts": []}',
        b'{"version": 2}',
    ],
    ids=["empty", "cut off", "a list", "null", "no text", "deep", "another machine", "another version"],
)
def test_files_that_make_no_sense_are_replaced(probed: list[object], content: bytes) -> None:
    file = proven_cache.path()
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert lookup() == ORDER
    assert len(probed) == 1
    assert proven_cache.load(file) == {proven._key(*PRODUCT): ORDER}


@pytest.mark.parametrize(
    "entry", [["abacus", 64], ["vdpbf16", -1], ["vdpbf16", "64"], ["vdpbf16"], "vdpbf16", [1, 2], 5]
)
def test_verdicts_that_make_no_sense_are_replaced(probed: list[object], entry: object) -> None:
    lookup()
    file = proven_cache.path()
    content = json.loads(file.read_text())
    content["verdicts"][0]["order"] = entry
    file.write_text(json.dumps(content))
    proven.clear()
    assert lookup() == ORDER
    assert len(probed) == 2


def test_another_environment_has_a_file_of_its_own(probed: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    here = proven_cache.path()
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    assert proven_cache.path() == here
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert proven_cache.path() != here


def test_a_directory_that_cannot_be_written(
    probed: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setenv("BITFORBIT_CACHE", str(blocked / "below"))
    assert lookup() == ORDER
    assert lookup() == ORDER
    assert len(probed) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory(probed: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path / "ro"))
    assert lookup() == ORDER


def test_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BITFORBIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert proven_cache.directory() == tmp_path / "bitforbit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert proven_cache.directory() == Path.home() / ".cache" / "bitforbit"
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path / "mine"))
    assert proven_cache.directory() == tmp_path / "mine"


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    """The file is whole at every moment, and no temporary file stays."""
    script = """
import sys
from bitforbit.cpu.linear import Order
from bitforbit.ops import proven_cache
for i in range(10):
    proven_cache.store(proven_cache.path(), {(int(sys.argv[1]), i): Order("vdpbf16", 32 * i)})
    assert proven_cache.load(proven_cache.path())
"""
    environment = {**os.environ, "BITFORBIT_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [subprocess.Popen([sys.executable, "-c", script, str(number)], env=environment) for number in range(2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    assert len(json.loads(files[0].read_text())["verdicts"]) >= 10


def exact(tokens: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator).bfloat16()
    x = torch.randn(tokens, 256, generator=generator).bfloat16()
    return x, weight, functional.linear(x, weight)


def recheck(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product was checked."""
    checked = []

    def decoded() -> torch.Tensor:
        checked.append(True)
        return functional.linear(x, weight)

    proven.recheck(64, 256, 1, False, got, decoded)
    return bool(checked)


def test_a_wrong_verdict_in_the_cache_is_caught(probed: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    proven_cache.store(proven_cache.path(), {proven._key(*PRODUCT): Order("vdpbf16", 32)})  # planted
    monkeypatch.setenv("BITFORBIT_PARANOID", "1")
    assert lookup() == Order("vdpbf16", 32)
    assert not probed
    x, weight, _ = exact()
    wrong = probe._encoded(probe.Inputs(weight, x, None), Order("lanes"), 1).clone()
    wrong[0, 5] += 1
    with pytest.raises(OrderMismatchError, match=r"expected .* 64 x 256 .* got"):
        recheck(wrong, x, weight)
    assert lookup() is None  # not proven for the rest of this process
    proven.clear()
    assert lookup() == ORDER  # probed again by the next
    assert len(probed) == 1


@pytest.mark.parametrize(
    ("setting", "checks"), [("", 0), ("0", 0), ("1", 12), ("0.25", 3), ("0.5", 6), ("3", 3), ("100", 12)]
)
def test_how_often_is_checked(probed: list[object], monkeypatch: pytest.MonkeyPatch, setting: str, checks: int) -> None:
    monkeypatch.setenv("BITFORBIT_PARANOID", setting)
    x, weight, right = exact()
    assert sum(recheck(right, x, weight) for _ in range(12)) == checks


@pytest.mark.parametrize("setting", ["often", "-1", "nan", "inf"])
def test_settings_that_make_no_sense(probed: list[object], monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("BITFORBIT_PARANOID", setting)
    x, weight, right = exact()
    with pytest.raises(UsageError, match="BITFORBIT_PARANOID"):
        recheck(right, x, weight)


def test_outputs_with_nan_are_not_settled() -> None:
    out = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert proven.settled(out)
    out[1, 2] = float("inf")
    assert proven.settled(out)
    out[2, 4] = float("nan")
    assert not proven.settled(out)
