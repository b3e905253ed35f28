"""Kernel texts to binaries: options, architectures, errors. NVRTC is the real one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bitforbit.cuda import compiler
from bitforbit.errors import BitforbitError, GpuArchitectureError, GpuPackageError, KernelBuildError

pytest.importorskip("cuda.bindings.nvrtc")

TEXT = 'extern "C" __global__ void fill(unsigned* gmem_out, unsigned value) { gmem_out[threadIdx.x] = value + EXTRA; }'
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


@pytest.mark.parametrize("arch", ARCHS)
def test_a_text_becomes_an_elf_file_for_its_architecture(arch: str) -> None:
    cubin, log = compiler.compile_with_log(TEXT, arch, [("EXTRA", "1")], ["--ptxas-options=-v"])
    assert cubin.startswith(b"\x7fELF")
    assert b"fill" in cubin
    assert f"Compiling entry function 'fill' for '{arch}'" in log
    assert "registers" in log


def test_the_same_input_gives_the_same_bytes() -> None:
    assert compiler.compile(TEXT, "sm_90a", [("EXTRA", "1")]) == compiler.compile(TEXT, "sm_90a", [("EXTRA", "1")])
    assert compiler.compile(TEXT, "sm_90a", [("EXTRA", "1")]) != compiler.compile(TEXT, "sm_90a", [("EXTRA", "2")])


def test_an_error_names_the_file_and_carries_the_log() -> None:
    with pytest.raises(KernelBuildError, match=r"(?s)fill\.cu to compile for sm_90a.*EXTRA.*undefined"):
        compiler.compile(TEXT, "sm_90a", name="fill.cu")


def test_an_architecture_that_nvrtc_does_not_know() -> None:
    with pytest.raises(KernelBuildError, match="sm_12"):
        compiler.compile(TEXT, "sm_12", [("EXTRA", "1")])


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((12, 0), "sm_120a"),
        ((12, 9), "sm_121"),  # unknown to this NVRTC: the plain binary of an older minor version
        ((8, 8), "sm_87"),
    ],
)
def test_target(capability: tuple[int, int], expected: str) -> None:
    assert compiler.target(capability, (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)) == expected


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (5, 2)])
def test_gpus_that_are_too_old(capability: tuple[int, int]) -> None:
    with pytest.raises(GpuArchitectureError, match=r"8\.0 or newer, got .* on the CPU"):
        compiler.target(capability)


@pytest.mark.parametrize("capability", [(13, 0), (10, 0)])
def test_gpus_that_nvrtc_does_not_know(capability: tuple[int, int]) -> None:
    with pytest.raises(GpuArchitectureError, match="install a newer nvidia-cuda-nvrtc"):
        compiler.target(capability, (80, 90, 103))


def test_the_targets_of_all_tested_architectures_are_known_to_this_nvrtc() -> None:
    known = {compiler.target(divmod(arch, 10)) for arch in compiler.supported() if arch >= 80}
    assert known >= set(ARCHS)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    compiler.version.cache_clear()
    with pytest.raises(GpuPackageError, match=r"cuda-bindings.*pip install 'bitforbit\[cuda\]'.*on the CPU") as raised:
        compiler.version()
    assert isinstance(raised.value, BitforbitError)


def test_nothing_of_cuda_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, bitforbit.cuda.launcher, bitforbit.cuda.cache\n"
        "print([n for n in sys.modules if n == 'cuda' or n.startswith('cuda.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
