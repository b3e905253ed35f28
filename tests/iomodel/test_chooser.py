"""The choice of an algorithm, and the devices it is made for."""

from __future__ import annotations

import pytest

from bitforbit.errors import IoModelError
from bitforbit.iomodel import ALGORITHMS, choose, count, crossover, find_machine, machine


@pytest.mark.parametrize(
    ("device", "d", "best"),
    [
        ("H100", 64, "flash2"),
        ("H200", 128, "flash2"),
        ("A100", 256, "flash2"),
        ("RTX 4090", 128, "flash2"),
        ("H100", 512, "rectangular"),
        ("RTX 4090", 512, "rectangular"),
    ],
)
def test_choice_on_gpus(device: str, d: int, best: str) -> None:
    """Shared memory holds d^2 words up to d = 256 or so, not more."""
    memory = find_machine(device).fast_words("BF16")
    choice = choose(8192, d, memory)
    assert choice.best.algorithm.name == best
    assert choice.best.words == min(p.words for p in choice.predictions if p.words is not None)
    for p in choice.predictions:
        assert p.words is not None
        assert p.words == count(p.algorithm.name, 8192, d, memory).moved
        assert p.ratio == pytest.approx(p.words / choice.bound)
        assert p.words >= choice.bound


def test_algorithms_that_do_not_fit() -> None:
    choice = choose(1000, 128, 300)
    unfit = {p.algorithm.name: p.least_memory for p in choice.predictions if p.words is None}
    assert unfit == {"flash1": 4 * 128 + 3, "flash2": 3 * 128 + 3}
    assert choice.best.algorithm.name == "rectangular"
    with pytest.raises(IoModelError, match="at least 3 words"):
        choose(1000, 128, 2)


@pytest.mark.parametrize(("n", "d", "memory"), [(0, 1, 9), (1, 0, 9), (1, 1, 0), (-5, 1, 9), (1, 1 << 17, 9)])
def test_sizes_out_of_range(n: int, d: int, memory: int) -> None:
    with pytest.raises(IoModelError, match="expected at"):
        choose(n, d, memory)


@pytest.mark.parametrize("d", [1, 2, 32, 64, 128, 512])
@pytest.mark.parametrize("n", [1, 64, 8192])
def test_crossover(n: int, d: int) -> None:
    at = crossover(n, d)
    if n == 8192 and d >= 32:
        assert at is not None
        assert 0.6 < at / d**2 < 0.8
    if at is not None:
        flash = ALGORITHMS["flash2"]
        others = [ALGORITHMS[name] for name in ("square_improved", "rectangular")]
        for memory in range(at, max(4 * d * d, at), max(1, d * d // 20)):
            assert flash.words(n, d, memory) <= 1.05 * min(other.words(n, d, memory) for other in others)


def test_strips_never_move_more_than_square_tiles() -> None:
    for d in (3, 64, 100, 512):
        for memory in range(5, 3 * d * d, max(1, d * d // 37)):
            words = [ALGORITHMS[name].words(4096, d, memory) for name in ("rectangular", "square_improved")]
            assert words[0] <= words[1]


def test_machines() -> None:
    assert find_machine("h100").fast_words("BF16") == 227 * 1024 // 2
    assert find_machine("a100").fast_words("F16") == 83456
    assert find_machine("rtx4090").fast_words("BF16") == find_machine("RTX 4090").fast_words("BF16") == 50688
    assert find_machine("H200").level("hbm").bandwidth == 4.8e12
    for wrong in ("gtx", "", "H100 PCIe"):
        with pytest.raises(IoModelError, match="a device among H100, H200, A100, RTX 4090, CPU"):
            find_machine(wrong)
    with pytest.raises(IoModelError, match="a level of memory among registers, SMEM, L2, HBM"):
        find_machine("H100").level("L3")
    with pytest.raises(IoModelError, match="a dtype among"):
        find_machine("H100").fast_words("INT4")


def test_levels_grow_outwards() -> None:
    for gpu in machine.GPUS:
        sizes = [level.nbytes for level in gpu.levels if level.cache]
        assert sizes == sorted(sizes)
        assert gpu.levels[-1].bandwidth


def test_this_cpu() -> None:
    cpu = find_machine("CPU")
    assert cpu.levels[-1].name == "DRAM"
    assert [level.nbytes for level in cpu.levels] == sorted(level.nbytes for level in cpu.levels)
    known = cpu.with_bandwidths({"dram": 1e10})
    assert known.level("DRAM").bandwidth == 1e10
    assert cpu.level("DRAM").bandwidth is None
    with pytest.raises(IoModelError, match="level of memory"):
        cpu.with_bandwidths({"L9": 1.0})


def test_cpu_without_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "data_caches", list)
    cpu = machine.this_cpu()
    assert cpu.fast == "DRAM"
    assert [level.name for level in cpu.levels] == ["DRAM"]


def test_fast_level() -> None:
    found, level = machine.find_fast_level("H100:l2")
    assert (found.name, level.name) == ("H100", "L2")
    assert machine.find_fast_level("A100")[1].name == "SMEM"
