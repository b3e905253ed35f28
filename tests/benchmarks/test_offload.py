"""The benchmark of models that do not fit: its ways agree, its limit holds, and what it shows is what it found."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from benchmarks.offload_worker import Outcome, Task  # noqa: E402

from benchmarks import memory_limit, model, offload, offload_worker  # noqa: E402
from bitforbit.integrations import autoload  # noqa: E402

autoload.autoload()

ROOT = Path(__file__).parents[2]
TAKE = (
    "import sys; from pathlib import Path; from benchmarks.memory_limit import Group; Group(Path(sys.argv[1])).join(); "
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model, plain and compressed."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFORBIT_BENCH_CACHE", str(cache))
        plain, compressed = model.build(offload.SMOKE.model)
    return plain.path, compressed.path


@pytest.fixture
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_all_ways_give_the_same_bits(made: tuple[Path, Path], tmp_path: Path) -> None:
    task = Task(offload.IN_MEMORY, str(made[0]), None, 4, 4, None, str(tmp_path))
    expected = offload_worker.measure(task)
    assert expected.blocks == {"cpu": 4}
    budget = round(0.6 * sum(path.stat().st_size for path in made[0].glob("*.safetensors")))
    kept = {}
    for way in offload.WAYS:
        path = made[1] if way.endswith("exact") else made[0]
        found = offload_worker.measure(replace(task, way=way, path=str(path), budget=budget))
        assert (found.tokens, found.digest) == (expected.tokens, expected.digest)
        assert sum(found.blocks.values()) == 4
        assert found.blocks["disk"]
        assert (found.slot_bytes > 0) == way.startswith("streamed")
        kept[way] = found.blocks.get("cpu", 0)
    assert kept["accelerate BF16"] < kept["accelerate exact"]


def test_memory_beyond_the_limit_ends_the_process() -> None:
    if not memory_limit.possible():
        pytest.skip("no right to make memory cgroups here")
    for size, ended in ((20, False), (400, True)):
        with memory_limit.limited(100 << 20) as group:
            assert group.path is not None
            command = [sys.executable, "-c", TAKE + f"x = bytearray({size} << 20)", str(group.path)]
            done = subprocess.run(command, cwd=ROOT, check=False)
            assert (done.returncode == -9) == ended
            assert (group.peak_bytes() or 0) > 10 << 20
            path = group.path
        assert not path.exists()


def test_without_cgroups_there_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "no-cgroup"
    plain.mkdir()
    monkeypatch.setattr(memory_limit, "ROOTS", (tmp_path / "none", plain))
    with memory_limit.limited(1 << 20) as group:
        group.join()
        assert group.peak_bytes() is None
    assert not memory_limit.possible()
    assert not list(plain.iterdir())


def test_a_process_that_ends_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("accelerate BF16", "none", 1, 1, 2, None, "")
    for status, error, message in (
        (-9, offload.OutOfMemoryError, "its limit does not suffice"),
        (1, RuntimeError, "got status 1: what went wrong"),
    ):
        done = subprocess.CompletedProcess([], status, "", "what went wrong")
        monkeypatch.setattr(offload.subprocess, "run", lambda *args, done=done, **kwargs: done)
        with pytest.raises(error, match=message):
            offload.run_alone(task)


def test_the_gate(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bits are no result."""
    monkeypatch.setenv("BITFORBIT_BENCH_CACHE", str(made[0].parent))
    good = Outcome([1, 2], "a", 1.0, 1.0, 0.5, 1e9, 10, 20, None, {"disk": 4}, 0, 0)

    def run(task: Task) -> Outcome:
        return replace(good, digest="b") if task.way == "streamed exact" else good

    monkeypatch.setattr(offload, "run_alone", run)
    with pytest.raises(AssertionError, match="60%, streamed exact: expected the tokens and logits"):
        offload.measure(offload.SMOKE)

    def fail(task: Task) -> Outcome:
        if task.way == "accelerate BF16":
            raise offload.OutOfMemoryError("too much")
        return good

    monkeypatch.setattr(offload, "run_alone", fail)
    result = offload.measure(offload.SMOKE)
    ways = result["budgets"][0]["ways"]
    assert ways["accelerate BF16"] == {"error": "too much"}
    assert ways["streamed exact"]["tokens_per_second"] == 2
    predicted = result["budgets"][0]["predicted"]
    assert predicted["accelerate BF16"]["resident"] < predicted["streamed exact"]["resident"] + 1
    assert predicted["accelerate BF16"]["bytes_per_token"] > predicted["streamed exact"]["bytes_per_token"]
    shown = offload.show(result)
    assert "out of memory" in shown
    assert "2.000" in shown
