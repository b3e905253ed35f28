"""Binaries on disk: found again, rebuilt when damaged, written by many processes at once."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitforbit.cuda import cache, compiler
from bitforbit.errors import KernelBuildError

pytest.importorskip("cuda.bindings.nvrtc")

TEXT = 'extern "C" __global__ void fill(unsigned* gmem_out) { gmem_out[threadIdx.x] = 7; }'
ARCH = "sm_90a"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, on disk and in memory."""
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path / "cache"))
    cache.forget()
    yield tmp_path / "cache" / "kernels"
    cache.forget()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures that were compiled for."""
    calls: list[str] = []
    real = compiler.compile

    def counted(text: str, arch: str, *arguments: object, **named: object) -> bytes:
        calls.append(arch)
        return real(text, arch, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "compile", counted)
    return calls


def test_compiled_once_per_process_and_found_by_the_next(folder: Path, compiled: list[str]) -> None:
    first = cache.cubin(TEXT, ARCH, name="fill.cu")
    assert cache.cubin(TEXT, ARCH, name="fill.cu") is first
    cache.forget()
    assert cache.cubin(TEXT, ARCH, name="fill.cu") == first == compiler.compile(TEXT, ARCH)
    assert compiled == [ARCH, ARCH]  # the second is this test's own
    (file,) = folder.iterdir()
    assert file.name.startswith("fill-sm_90a-")
    assert file.suffix == ".cubin"


def test_everything_that_a_binary_depends_on_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [cache.digest(TEXT, ARCH, ())]
    keys.append(cache.digest(TEXT + " ", ARCH, ()))
    keys.append(cache.digest(TEXT, "sm_80", ()))
    keys.append(cache.digest(TEXT, ARCH, [("A", "1")]))
    keys.append(cache.digest(TEXT, ARCH, [("A", "2")]))
    keys.append(cache.digest(TEXT, ARCH, [("A", "1"), ("B", "2")]))
    monkeypatch.setattr(compiler, "OPTIONS", ("--std=c++20",))
    keys.append(cache.digest(TEXT, ARCH, ()))
    monkeypatch.setattr(compiler, "version", lambda: (99, 0))
    keys.append(cache.digest(TEXT, ARCH, ()))
    monkeypatch.setattr(cache, "MAGIC", b"bfbcubn\x02")
    keys.append(cache.digest(TEXT, ARCH, ()))
    assert len(set(keys)) == len(keys)


DAMAGES = {
    "empty": lambda content: b"",
    "cut within the header": lambda content: content[:30],
    "cut within the binary": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "another magic": lambda content: b"X" + content[1:],
    "a bit of the checksum": lambda content: content[:20] + bytes([content[20] ^ 1]) + content[21:],
    "a bit of the binary": lambda content: content[:100] + bytes([content[100] ^ 0x80]) + content[101:],
    "text": lambda content: b"not found\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_built_anew(folder: Path, compiled: list[str], damage) -> None:  # type: ignore[no-untyped-def]
    good = cache.cubin(TEXT, ARCH)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    cache.forget()
    assert cache.cubin(TEXT, ARCH) == good
    assert compiled == [ARCH, ARCH]
    assert file.read_bytes() == content


def test_an_entry_of_another_key_is_not_taken(folder: Path, compiled: list[str]) -> None:
    cache.cubin(TEXT, "sm_80", name="k")
    (other,) = folder.iterdir()
    wanted = cache.path(cache.digest(TEXT, ARCH, ()), "k", ARCH)
    assert wanted is not None
    other.rename(wanted)
    assert cache.cubin(TEXT, ARCH, name="k") == compiler.compile(TEXT, ARCH)
    assert compiled == ["sm_80", ARCH, ARCH]


@pytest.mark.parametrize("blocked", ["file", "no home"])
def test_without_a_place_binaries_live_in_memory_and_one_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str], blocked: str
) -> None:
    if blocked == "file":
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("BITFORBIT_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.warns(RuntimeWarning, match="BITFORBIT_CACHE"):
        first = cache.cubin(TEXT, ARCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.cubin(TEXT, ARCH, [("A", "1")])
        assert cache.cubin(TEXT, ARCH) is first
    assert len(compiled) == 2


def test_what_does_not_compile_leaves_nothing_behind(folder: Path) -> None:
    with pytest.raises(KernelBuildError):
        cache.cubin("not a kernel", ARCH)
    assert not folder.exists() or not list(folder.iterdir())


def test_many_processes_at_once(folder: Path) -> None:
    code = (
        "import hashlib, sys\nfrom bitforbit.cuda import cache\nsys.stdin.readline()\n"
        "for i in range(4): print(hashlib.sha256(cache.cubin(sys.argv[1], 'sm_90a', [('N', str(i))])).hexdigest())"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, TEXT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(6)
    ]
    for process in running:  # all have imported what they need
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    assert len({out for out, _ in outputs}) == 1
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".cubin"] * 4  # nothing half-written lies around
    for file, macro in (
        (cache.path(cache.digest(TEXT, ARCH, [("N", str(i))]), "kernel.cu", ARCH), i) for i in range(4)
    ):
        assert file in files, macro
