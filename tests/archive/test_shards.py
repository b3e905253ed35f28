"""A model compressed in parts, by whomever and however often: after the merge it is what one run writes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitforbit
from bitforbit import archive, cpu, errors
from bitforbit.archive import parts
from bitforbit.archive.share import files_of_part
from bitforbit.archive.source import SourceFile
from helpers import assert_same_tree, digest_tree
from helpers.models import build_model, noise, safetensors_bytes


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Eight shards, a shard in a folder with a config of its own, and hostile tensors."""
    root = build_model(tmp_path / "model", shards=8)
    (root / "vae").mkdir()
    (root / "vae" / "config.json").write_text('{"a": 1}')
    odd = {"x.weight": noise("BF16", (64, 65)), "y": noise("F32", (63,)), "empty": ("BF16", (0, 4), b"")}
    (root / "vae" / "model.safetensors").write_bytes(safetensors_bytes(odd))
    (root / "nothing.safetensors").write_bytes(safetensors_bytes({}))
    return root


@pytest.fixture
def expected(many: Path, tmp_path: Path) -> Path:
    archive.compress(many, tmp_path / "expected")
    return tmp_path / "expected"


def staging(dst: Path) -> Path:
    return dst.with_name(dst.name + ".bitforbit-parts")


def all_parts(src: Path, dst: Path, n: int = 3, **options: Any) -> None:
    for i in range(1, n + 1):
        archive.compress(src, dst, part=(i, n), **options)


# --- how the files are shared out --------------------------------------------------------------------------------


def naive_shares(sizes: dict[str, int], n: int) -> list[list[str]]:
    """Largest first, each to the share with the fewest bytes, the first of several."""
    shares: list[list[str]] = [[] for _ in range(n)]
    for path in sorted(sizes, key=lambda p: (-sizes[p], p)):
        min(shares, key=lambda share: sum(sizes[p] for p in share)).append(path)
    return shares


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=4), st.integers(0, 50), max_size=12), st.integers(1, 15))
def test_shares(sizes: dict[str, int], n: int) -> None:
    files = [SourceFile(path, Path(path), size, 0) for path, size in sizes.items()]
    shares = [[f.path for f in files_of_part(files, (i, n))] for i in range(1, n + 1)]
    assert shares == naive_shares(sizes, n)
    assert sorted(itertools.chain(*shares)) == sorted(sizes)
    again = [[f.path for f in files_of_part(files[::-1], (i, n))] for i in range(1, n + 1)]
    assert again == shares


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (-1, 2), (1, 0)])
def test_parts_that_do_not_exist(part: tuple[int, int], model: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="1 <= i <= n"):
        archive.compress(model, tmp_path / "c", part=part)
    assert not staging(tmp_path / "c").exists()


# --- the result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_parts_give_what_one_run_gives(n: int, many: Path, expected: Path, tmp_path: Path) -> None:
    dst = tmp_path / "somewhere" / "c"
    before = digest_tree(many)
    reports = [archive.compress(many, dst, part=(i, n), threads=2) for i in reversed(range(1, n + 1))]
    assert not dst.exists()
    assert reports[-1].remaining_files == 0
    assert all(report.remaining_files for report in reports[:-1] if n < 4)
    merged = bitforbit.merge(many, dst)
    assert_same_tree(dst, expected)
    assert digest_tree(many) == before
    assert [p.name for p in dst.parent.iterdir()] == ["c"]
    assert merged.shards == sum(report.shards for report in reports) == 10
    assert merged.weight_compressed_bytes == sum(report.weight_compressed_bytes for report in reports)
    assert merged.compressed_bytes == sum(p.stat().st_size for p in dst.rglob("*") if p.is_file())
    assert archive.verify(dst, against=many).ok


def test_parts_can_be_repeated_and_cut_anew(many: Path, expected: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    first = archive.compress(many, dst, part=(1, 2))
    assert archive.compress(many, dst, part=(1, 2), resume=True).resumed_files == first.files
    inodes = {p: p.stat().st_ino for p in staging(dst).rglob("*.safetensors")}
    all_parts(many, dst, 5)
    assert {p: p.stat().st_ino for p in inodes} == inodes
    archive.merge(many, dst)
    assert_same_tree(dst, expected)


def test_four_workers_at_once_two_with_each_part(many: Path, expected: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    barrier = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            barrier.wait()
            archive.compress(many, dst, part=(i, 2), threads=1)
        except BaseException as e:  # noqa: BLE001 - handed to the test
            failures.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    archive.merge(many, dst)
    assert_same_tree(dst, expected)
    assert not list(tmp_path.glob("c.*"))


def test_machines_with_other_processors(many: Path, expected: Path, tmp_path: Path) -> None:
    names = [name for name, supported in cpu.implementations().items() if supported]
    for i, name in enumerate(names, 1):
        with cpu.force(name):
            archive.compress(many, tmp_path / "c", part=(i, len(names)))
    archive.merge(many, tmp_path / "c")
    assert_same_tree(tmp_path / "c", expected)


def test_another_copy_of_the_source_with_the_same_times(many: Path, expected: Path, tmp_path: Path) -> None:
    shutil.copytree(many, tmp_path / "copy")
    archive.compress(many, tmp_path / "c", part=(1, 2))
    archive.compress(tmp_path / "copy", tmp_path / "c", part=(2, 2))
    archive.merge(tmp_path / "copy", tmp_path / "c")
    assert_same_tree(tmp_path / "c", expected)


def test_selection(many: Path, tmp_path: Path) -> None:
    archive.compress(many, tmp_path / "expected", exclude=["*.mlp.*"], include=["model.*"])
    all_parts(many, tmp_path / "c", exclude=["*.mlp.*"], include=["model.*"])
    with pytest.raises(errors.UsageError, match="lists of globs"):
        archive.merge(many, tmp_path / "c", exclude="*.mlp.*")
    with pytest.raises(errors.ResumeError, match="exclude"):
        archive.merge(many, tmp_path / "c", exclude=["*.other.*"])
    archive.merge(many, tmp_path / "c", include=["model.*"])
    assert_same_tree(tmp_path / "c", tmp_path / "expected")


# --- what is refused, and leaves everything as it is ---------------------------------------------------------------


def refused(kind: type[Exception], match: str, dst: Path, run: Any) -> None:
    before = digest_tree(staging(dst))
    with pytest.raises(kind, match=match):
        run()
    assert digest_tree(staging(dst)) == before
    assert not dst.exists()


def test_merge_names_what_is_missing(many: Path, expected: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    with pytest.raises(errors.ResumeError, match="got none"):
        archive.merge(many, dst)
    archive.compress(many, dst, part=(2, 3))
    refused(errors.IncompletePartsError, r"model-0000\d-of", dst, lambda: archive.merge(many, dst))
    all_parts(many, dst)
    lost = next(staging(dst).rglob("model-00004-of-00008.safetensors"))
    lost.unlink()
    torn = next(staging(dst).rglob("model-00005-of-00008.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-1])
    match = r"missing: model-00004-of-00008.safetensors, model-00005-of-00008.safetensors\. Run"
    refused(errors.IncompletePartsError, match, dst, lambda: archive.merge(many, dst))
    all_parts(many, dst)
    archive.merge(many, dst)
    assert_same_tree(dst, expected)


def test_a_damaged_receipt_counts_as_none(many: Path, tmp_path: Path) -> None:
    all_parts(many, tmp_path / "c")
    receipts = sorted(staging(tmp_path / "c").glob("*/done/*"))
    for receipt, text in zip(receipts, ("", "{", "[]", '{"path": "../x"}', receipts[9].read_text()), strict=False):
        receipt.write_text(text)
    refused(
        errors.IncompletePartsError, r"got \d+; missing", tmp_path / "c", lambda: archive.merge(many, tmp_path / "c")
    )
    all_parts(many, tmp_path / "c")
    archive.merge(many, tmp_path / "c")
    assert archive.verify(tmp_path / "c", against=many).ok


def test_a_long_list_of_missing_files_is_cut(tmp_path: Path) -> None:
    src = build_model(tmp_path / "m", shards=30, dim=8)
    archive.compress(src, tmp_path / "c", part=(32, 32))
    with pytest.raises(errors.IncompletePartsError, match=r"got 1; missing: .* and 11 more\. Run"):
        archive.merge(src, tmp_path / "c")


def test_other_settings_sources_and_versions(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = tmp_path / "c"
    archive.compress(many, dst, part=(1, 2))

    def other(**options: Any) -> Any:
        return lambda: archive.compress(many, dst, part=(2, 2), **options)

    refused(errors.ResumeError, "expected exclude", dst, other(exclude=["*.mlp.*"]))
    refused(errors.ResumeError, "expected include", dst, other(include=["*.mlp.*"]))
    with monkeypatch.context() as patch:
        patch.setattr("bitforbit.archive.job.FORMAT_VERSION", 99)
        refused(errors.ResumeError, "expected format_version 1 .* got 99", dst, other())
        refused(errors.ResumeError, "format_version", dst, lambda: archive.merge(many, dst))
    with monkeypatch.context() as patch:
        patch.setattr(parts, "__version__", "9.9.9")
        refused(errors.ResumeError, r"expected writer .* got 9\.9\.9", dst, other())
        refused(errors.ResumeError, "writer", dst, lambda: archive.merge(many, dst))
    times = (many / "tokenizer.json").stat()
    os.utime(many / "tokenizer.json", ns=(1, 1))
    refused(errors.ResumeError, r"tokenizer\.json", dst, other())
    refused(errors.ResumeError, r"tokenizer\.json", dst, lambda: archive.merge(many, dst))
    os.utime(many / "tokenizer.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    (many / "more.txt").write_text("x")
    refused(errors.ResumeError, r"more\.txt", dst, other())
    (many / "more.txt").unlink()
    archive.compress(many, dst, part=(2, 2))
    archive.merge(many, dst)
    assert archive.verify(dst, against=many).ok


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"include": [1], "exclude": []}'])
def test_damaged_plan(text: str, many: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    archive.compress(many, dst, part=(1, 2))
    (staging(dst) / "plan.json").write_text(text)
    refused(errors.ResumeError, "damaged", dst, lambda: archive.compress(many, dst, part=(2, 2)))
    refused(errors.ResumeError, "damaged", dst, lambda: archive.merge(many, dst))


def test_a_plan_from_the_future(many: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    archive.compress(many, dst, part=(1, 2))
    plan = json.loads((staging(dst) / "plan.json").read_text())
    (staging(dst) / "plan.json").write_text(json.dumps({**plan, "colour": "blue"}))
    refused(errors.ResumeError, "expected colour blue", dst, lambda: archive.compress(many, dst, part=(2, 2)))


def test_a_run_without_parts_leaves_them(many: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    archive.compress(many, dst, part=(1, 2))
    before = digest_tree(staging(dst))
    archive.compress(many, dst)
    assert digest_tree(staging(dst)) == before
    with pytest.raises(errors.DestinationExistsError):
        archive.compress(many, dst, part=(2, 2))
    archive.compress(many, dst, part=(2, 2), overwrite=True)
    with pytest.raises(errors.DestinationExistsError):
        archive.merge(many, dst)
    archive.merge(many, dst, overwrite=True)
    assert archive.verify(dst, against=many).ok
    assert not list(tmp_path.glob("c.*"))


def test_what_has_no_parts(model: Path, tmp_path: Path) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    with pytest.raises(errors.UsageError, match="directories"):
        archive.compress(shard, tmp_path / "c.safetensors", part=(1, 2))
    with pytest.raises(errors.UsageError, match="native format"):
        archive.compress(model, tmp_path / "c", part=(1, 2), format="df11")
    with pytest.raises(errors.DestinationInsideSourceError):
        archive.compress(model, model / "c", part=(1, 2))
    with pytest.raises(errors.DestinationInsideSourceError):
        archive.merge(model, model / "c")


def test_hopelessly_full_disk(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "free_bytes", lambda path: 1000)
    with pytest.raises(errors.DiskFullError, match="Nothing was written"):
        archive.compress(many, tmp_path / "c", part=(1, 2))
    assert not list(tmp_path.glob("c.*"))


def test_full_disk(many: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    calls: list[int] = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(errors.DiskFullError, match="run the same part again"):
            archive.compress(many, tmp_path / "c", part=(1, 2), threads=1)
    all_parts(many, tmp_path / "c", 2)
    archive.merge(many, tmp_path / "c")
    assert_same_tree(tmp_path / "c", expected)


# --- merges that are stopped or meet -----------------------------------------------------------------------------


class Stopped(BaseException):
    """As good as a kill: nothing that runs afterwards is told."""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_merge_stopped(
    where: str, swap: bool, overwrite: bool, many: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "c"
    if overwrite:
        archive.compress(many, dst, exclude=["*"])
    all_parts(many, dst, overwrite=overwrite)

    def stop(*_: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patch:
        if not swap:
            patch.setattr("bitforbit.archive.filesystem.exchange", lambda a, b: False)
        if where == "before":
            patch.setattr(parts, "replace", stop)
        elif where == "after":
            patch.setattr(parts.Parts, "remove", stop)
        else:
            patch.setattr("bitforbit.archive.filesystem.sync_directory", stop)
        with pytest.raises(Stopped):
            archive.merge(many, dst, overwrite=overwrite)
    archive.merge(many, dst, overwrite=overwrite)
    assert_same_tree(dst, expected)
    assert not list(tmp_path.glob("c.*"))


def test_swap_stopped_halfway(many: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names cannot be swapped, the old destination steps aside first."""
    dst = tmp_path / "c"
    archive.compress(many, dst, exclude=["*"])
    all_parts(many, dst, overwrite=True)

    def halfway(new: Path, old: Path, aside: Path) -> None:
        old.rename(aside)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(parts, "replace", halfway)
        with pytest.raises(Stopped):
            archive.merge(many, dst, overwrite=True)
    assert not dst.exists()
    with pytest.raises(errors.DestinationExistsError):
        archive.merge(many, dst)
    assert dst.exists()
    archive.merge(many, dst, overwrite=True)
    assert_same_tree(dst, expected)


def test_two_merges_at_a_time(many: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = tmp_path / "c"
    all_parts(many, dst)
    real = parts.sync_tree
    seen: list[type[Exception]] = []

    def second(tree: Path) -> None:
        monkeypatch.setattr(parts, "sync_tree", real)
        with pytest.raises(errors.UsageError, match="another merge") as raised:
            archive.merge(many, dst)
        seen.append(raised.type)
        # On a file system without locks it runs, and the first one finds its tree gone.
        with monkeypatch.context() as patch:
            patch.setattr(parts, "_try_lock", lambda fd: None)
            archive.merge(many, dst)

    monkeypatch.setattr(parts, "sync_tree", second)
    with pytest.raises(errors.BitforbitError):
        archive.merge(many, dst)
    assert seen == [errors.UsageError]
    assert_same_tree(dst, expected)
    assert not list(tmp_path.glob("c.*"))


# --- workers that come late --------------------------------------------------------------------------------------


class AtStart:
    """Calls a function when the work begins."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def start(self, total_bytes: int, description: str) -> None:
        act, self.act = self.act, lambda: None
        act()

    def advance(self, nbytes: int) -> None:
        pass

    def finish(self) -> None:
        pass


def test_worker_that_another_overtakes(many: Path, expected: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    late = AtStart(lambda: archive.compress(many, dst, part=(1, 1)))
    archive.compress(many, dst, part=(1, 2), progress=late)
    archive.merge(many, dst)
    assert_same_tree(dst, expected)


def test_worker_that_sleeps_through_the_merge(
    many: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "c"

    def others() -> None:
        all_parts(many, dst)
        archive.merge(many, dst)

    with pytest.raises(errors.ResumeError, match="merged or removed"):
        archive.compress(many, dst, part=(1, 2), progress=AtStart(others))
    assert_same_tree(dst, expected)
    assert not list(tmp_path.glob("c.*"))


def test_worker_whose_files_are_merged_before_it_counts_them(
    many: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "c"
    late = AtStart(lambda: None)
    monkeypatch.setattr(late, "finish", lambda: (archive.merge(many, dst), None)[1])
    archive.compress(many, dst, part=(1, 2))
    with pytest.raises(errors.ResumeError, match="merged or removed"):
        archive.compress(many, dst, part=(2, 2), progress=late)
    assert_same_tree(dst, expected)


def test_worker_that_wakes_up_among_parts_of_other_settings(many: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"

    def begin_anew() -> None:
        shutil.rmtree(staging(dst))
        all_parts(many, dst, exclude=["*.mlp.*"])

    with pytest.raises(errors.ResumeError, match="merged or removed"):
        archive.compress(many, dst, part=(1, 2), progress=AtStart(begin_anew))
    archive.merge(many, dst)
    archive.compress(many, tmp_path / "expected", exclude=["*.mlp.*"])
    assert_same_tree(dst, tmp_path / "expected")


def test_remains_of_dead_workers(many: Path, tmp_path: Path) -> None:
    dst = tmp_path / "c"
    archive.compress(many, dst, part=(1, 2))
    temporary = next(staging(dst).glob("*/tmp"))
    host = parts._host()
    dead = temporary / f"{host}-123-{'0' * 16}"
    others = [temporary / f"elsewhere-123-{'0' * 16}", temporary / f"{host}-1-123-{'0' * 16}"]
    for path in (dead, *others):
        path.write_bytes(b"half")
    with (temporary / f"{host}-123-{'1' * 16}").open("wb") as alive:
        parts._try_lock(alive.fileno())
        alive.write(b"half")
        alive.flush()
        archive.compress(many, dst, part=(2, 2))
        assert sorted(temporary.iterdir()) == sorted([Path(alive.name), *others])
    archive.merge(many, dst)
    assert not list(tmp_path.glob("c.*"))
