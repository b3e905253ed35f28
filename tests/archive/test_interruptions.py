"""Killed, out of space, resumed: the source stays untouched and the destination is whole or as before."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bitforbit
from bitforbit import archive, errors
from helpers import assert_same_tree, digest_tree
from helpers.models import build_model

SOURCE = Path(bitforbit.__file__).parents[1]


def start(code: str, *args: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=environment, stdout=subprocess.PIPE)


SLOW_RUN = """
import sys, time
from bitforbit import archive
class Slow:
    def start(self, total, description): print("started", flush=True)
    def advance(self, nbytes): time.sleep(0.01)
    def finish(self): pass
archive.compress(sys.argv[1], sys.argv[2], threads=2, overwrite=True, resume=True, progress=Slow())
"""


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return build_model(tmp_path / "model", shards=8)


def test_killed_at_random_moments_and_resumed(many: Path, tmp_path: Path) -> None:
    before = digest_tree(many)
    archive.compress(many, tmp_path / "expected")
    dst = tmp_path / "c"
    dst.mkdir()
    (dst / "old").write_text("old")
    rng = random.Random(1)
    for _ in range(5):
        process = start(SLOW_RUN, many, dst)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert digest_tree(many) == before
        if not (dst / "old").exists():  # it was quick enough: then it must be complete
            assert_same_tree(dst, tmp_path / "expected")
    report = archive.compress(many, dst, overwrite=True, resume=True)
    assert_same_tree(dst, tmp_path / "expected")
    assert digest_tree(many) == before
    assert report.resumed_files >= 0
    assert not (tmp_path / "c.bitforbit-partial").exists()


class Interrupting:
    """Raises KeyboardInterrupt once so many bytes are done."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, total_bytes: int, description: str) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise KeyboardInterrupt

    def finish(self) -> None:
        pass


def interrupt(run: Any, src: Path, dst: Path, share: float = 0.5) -> Path:
    size = sum(p.stat().st_size for p in src.rglob("*") if p.is_file())
    with pytest.raises(KeyboardInterrupt):
        run(src, dst, threads=1, progress=Interrupting(int(size * share)))
    assert not dst.exists()
    return dst.with_name(dst.name + ".bitforbit-partial")


@pytest.mark.parametrize("operation", ["compress", "decompress"])
def test_resume_takes_over_what_is_finished(operation: str, many: Path, tmp_path: Path) -> None:
    archive.compress(many, tmp_path / "compressed")
    src, run = (many, archive.compress) if operation == "compress" else (tmp_path / "compressed", archive.decompress)
    staging = interrupt(run, src, tmp_path / "out")
    journal = staging / "journal.jsonl"
    # A file may have got its name without a line in the journal yet: such a one is written again.
    finished = [json.loads(line)["path"] for line in journal.read_text().splitlines()[1:]]
    inodes = {path: (staging / "tree" / path).stat().st_ino for path in finished}
    with journal.open("ab") as file:
        file.write(b'{"torn')
    report = run(src, tmp_path / "out", resume=True)
    assert report.resumed_files == len(finished) > 0
    assert {path: (tmp_path / "out" / path).stat().st_ino for path in finished} == inodes
    assert_same_tree(tmp_path / "out", tmp_path / "compressed" if operation == "compress" else many)


def test_without_resume_a_run_starts_clean(many: Path, tmp_path: Path) -> None:
    staging = interrupt(archive.compress, many, tmp_path / "c")
    (staging / "tree" / "stray").write_text("x")
    assert archive.compress(many, tmp_path / "c").resumed_files == 0
    assert not (tmp_path / "c" / "stray").exists()
    assert not staging.exists()


def test_resume_refuses_other_options_and_sources(many: Path, tmp_path: Path) -> None:
    staging = interrupt(archive.compress, many, tmp_path / "c")
    with pytest.raises(errors.ResumeError, match="options"):
        archive.compress(many, tmp_path / "c", resume=True, exclude=["*.mlp.*"])
    os.utime(many / "tokenizer.json", ns=(1, 1))
    with pytest.raises(errors.ResumeError, match=r"tokenizer\.json"):
        archive.compress(many, tmp_path / "c", resume=True)
    assert staging.exists()
    (staging / "journal.jsonl").write_bytes(b"x\n")
    with pytest.raises(errors.ResumeError, match="damaged"):
        archive.compress(many, tmp_path / "c", resume=True)
    archive.compress(many, tmp_path / "c")
    assert archive.verify(tmp_path / "c", against=many).ok


def test_a_finished_file_that_is_gone_is_written_again(many: Path, tmp_path: Path) -> None:
    staging = interrupt(archive.compress, many, tmp_path / "c")
    sorted((staging / "tree").glob("*.safetensors"))[0].unlink()
    archive.compress(many, tmp_path / "c", resume=True)
    assert archive.verify(tmp_path / "c", against=many).ok


def test_staging_is_no_link(model: Path, tmp_path: Path) -> None:
    """What is in the staging directory is deleted: nobody may point it elsewhere."""
    elsewhere = tmp_path / "precious"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (tmp_path / "c.bitforbit-partial").symlink_to(elsewhere)
    with pytest.raises(errors.UsageError, match="symbolic link"):
        archive.compress(model, tmp_path / "c")
    assert (elsewhere / "file").exists()


def test_two_runs_do_not_share_a_destination(model: Path, tmp_path: Path) -> None:
    class Nested:
        error: Exception | None = None

        def start(self, total_bytes: int, description: str) -> None:
            try:
                archive.compress(model, tmp_path / "c")
            except errors.UsageError as e:
                self.error = e

        def advance(self, nbytes: int) -> None:
            pass

        def finish(self) -> None:
            pass

    nested = Nested()
    archive.compress(model, tmp_path / "c", progress=nested)
    assert "another run" in str(nested.error)
    assert archive.verify(tmp_path / "c").ok


def test_source_that_changes_meanwhile(model: Path, tmp_path: Path) -> None:
    class Touch:
        def start(self, total_bytes: int, description: str) -> None:
            os.utime(min(model.glob("*.safetensors")), ns=(1, 1))

        def advance(self, nbytes: int) -> None:
            pass

        def finish(self) -> None:
            pass

    with pytest.raises(errors.ChecksumError, match="changed while"):
        archive.compress(model, tmp_path / "c", progress=Touch())
    assert not (tmp_path / "c.bitforbit-partial").exists()


# --- full disks --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=192k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk(many: Path, tiny_disk: Path) -> None:
    before = digest_tree(many)
    with pytest.raises(errors.DiskFullError, match="bytes are free, about"):
        archive.compress(many, tiny_disk / "c")
    assert not (tiny_disk / "c").exists()
    assert (tiny_disk / "c.bitforbit-partial").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", tiny_disk], check=True)
    assert archive.compress(many, tiny_disk / "c", resume=True).resumed_files > 0
    assert archive.verify(tiny_disk / "c", against=many).ok
    assert digest_tree(many) == before


def test_hopelessly_full_disk(tmp_path: Path, tiny_disk: Path) -> None:
    src = build_model(tmp_path / "big", dim=1024)
    with pytest.raises(errors.DiskFullError, match="Nothing was written"):
        archive.compress(src, tiny_disk / "c")
    assert not list(tiny_disk.iterdir())


def test_write_that_fails_for_lack_of_space(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    calls = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(errors.DiskFullError, match="resume"):
        archive.compress(many, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert archive.compress(many, tmp_path / "c", resume=True).resumed_files > 0


# --- memory ------------------------------------------------------------------------------------------------------

PEAK_RUN = """
import json, resource, sys
from bitforbit import archive
report = {"compress": archive.compress, "decompress": archive.decompress, "verify": archive.verify,
          "inspect": archive.inspect}[sys.argv[1]](*sys.argv[2:])
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({"peak": peak, "seconds": report.seconds}))
"""


@pytest.mark.slow
def test_peak_memory(tmp_path: Path) -> None:
    src = build_model(tmp_path / "m", shards=5, dim=3200)
    largest = 2 * 3200 * 3200 * 2
    for args in (
        ("compress", src, tmp_path / "c"),
        ("decompress", tmp_path / "c", tmp_path / "r"),
        ("verify", tmp_path / "c"),
        ("inspect", src),
        ("inspect", tmp_path / "c"),
    ):
        output, _ = start(PEAK_RUN, *args).communicate()
        result = json.loads(output)
        print(args[0], result)
        assert result["peak"] < 2 * largest + 300e6, args
