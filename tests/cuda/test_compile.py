"""Every kernel compiles, without spills, to what the tracked table says of it (docs/kernels.md)."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from benchmarks import kernel_table, sass
from bitforbit.cuda import compiler, registry, sources
from bitforbit.cuda.kernel import Kernel

WRITE = "run: python -m benchmarks.kernel_table --write"
TABLE = kernel_table.recorded()
NUMBERS = TABLE["kernels"]
OLDEST, *_, NEWEST = kernel_table.ARCHS


def test_all_entry_points_are_in_the_list() -> None:
    assert registry.missing() == []
    assert len(set(registry.KERNELS)) == len(registry.KERNELS)


def test_the_table_is_that_of_the_kernels_as_they_are() -> None:
    digests = {kernel_table.label(kernel): kernel_table.digest(kernel) for kernel in registry.KERNELS}
    assert {name: numbers["digest"] for name, numbers in NUMBERS.items()} == digests, WRITE
    page = kernel_table.PAGE.read_text()
    assert kernel_table.render(TABLE) in page, WRITE


def test_no_kernel_spills() -> None:
    excepted = {kernel_table.label(kernel) for kernel in registry.STACK}
    spilling = {
        f"{name}, {arch}"
        for name, numbers in NUMBERS.items()
        for arch, found in numbers["resources"].items()
        if name not in excepted and found["spills"] + found["stack"] != 0
    }
    assert spilling == set()


def test_the_table_has_every_architecture() -> None:
    assert {tuple(numbers["resources"]) for numbers in NUMBERS.values()} == {kernel_table.ARCHS}


def asks_for_the_architecture(source: str) -> bool:
    return "__CUDA_ARCH" in sources.text(source)


def test_texts_differ_between_three_classes_of_architectures() -> None:
    """Below sm_90, sm_90a, above it: what is compiled below has one of each class."""
    asked = {
        condition
        for source in {kernel.source for kernel in registry.KERNELS}
        for condition in re.findall(r"__CUDA_ARCH\w*(?: *[<>=!]+ *\d+)?", sources.text(source))
    }
    assert asked == {"__CUDA_ARCH__", "__CUDA_ARCH__ < 900", "__CUDA_ARCH__ >= 900", "__CUDA_ARCH_FEAT_SM90_ALL"}


@pytest.mark.parametrize("arch", [OLDEST, kernel_table.COUNTED_ARCH, NEWEST])
def test_registers_and_shared_memory_are_as_recorded(arch: str) -> None:
    """All kernels on the oldest and newest architecture, between them those whose text asks for it.

    The other entries are of the same texts and options, as their digests are: --write compiled them.
    """
    installed = importlib.metadata.version("nvidia-cuda-nvrtc")
    if installed != TABLE["nvrtc"]:
        pytest.skip(f"the table is by NVRTC {TABLE['nvrtc']}, installed is {installed}")
    binaries = {
        (source, defines): kernels
        for (source, defines), kernels in registry.binaries().items()
        if arch in (OLDEST, NEWEST) or asks_for_the_architecture(source)
    }
    names = [kernel_table.label(kernel) for kernels in binaries.values() for kernel in kernels]
    recorded = {name: NUMBERS[name]["resources"][arch] for name in names}
    assert kernel_table.resources(arch, binaries) == recorded, WRITE


@pytest.mark.parametrize("kernel", registry.KERNELS, ids=kernel_table.label)
def test_parameters_and_blocks_suit_the_text(kernel: Kernel) -> None:
    from cuda_shim.emulation import check_parameters, library

    check_parameters(library(kernel.source, kernel.defines), kernel)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A kernel whose loops and pipes are known."""
    path = tmp_path / "text.cu"
    path.write_text(
        """extern "C" __global__ void scale(const float* in, float* out, unsigned n, float by) {
  for (unsigned i = threadIdx.x; i < n; i += 32) {
    if (i == n - 1) {
      out[i] = 0;
    } else {
#pragma unroll 1
      for (unsigned j = 0; j < i; ++j) out[j] += in[i];
    }
  }
}
"""
    )
    return str(path)


def test_instructions_are_counted_by_region(text: str) -> None:
    if sass.nvdisasm() is None:
        pytest.skip("no nvdisasm")
    function = sass.disassemble(compiler.compile(sources.text(text), "sm_90a", (), ["-lineinfo"]))["scale"]
    outer, inner = sass.block_lines(text, "for (unsigned i"), sass.block_lines(text, "for (unsigned j")
    assert sorted(line for _, line in outer) == list(range(2, 10))
    assert sorted(line for _, line in inner) == [7]
    whole, alone = sass.counted(function, outer, True), sass.counted(function, outer, True, [inner])
    body = sass.counted(function, inner, True)
    assert body["fma"] >= 1
    assert body["memory"] >= 2
    assert alone["memory"] == 1  # the store of zero
    assert sum(body.values()) < sum(whole.values()) < len(function.instructions)
    assert sass.block_lines(text, "around: out[i] = 0;") == frozenset((Path(text).name, line) for line in (3, 4, 5))
    with pytest.raises(ValueError, match="expected one line that starts with 'while'"):
        sass.block_lines(text, "while")
