"""Registers, shared memory, spills and instructions of all kernels: ``python -m benchmarks.kernel_table [--write]``.

Compiles every kernel for six architectures with the options of the package; needs NVRTC and nvdisasm, no GPU. --write
replaces ``benchmarks/results/kernels.json``, which tests compare with, and the tables of ``docs/kernels.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks import sass
from benchmarks.common import RESULTS, ROOT, table
from bitforbit.cuda import compiler, registry, sources
from bitforbit.cuda.kernel import Kernel

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
COUNTED_ARCH = "sm_90a"
"""Whose instructions are counted: pipes differ between architectures."""
RESULT = RESULTS / "kernels.json"
PAGE = ROOT / "docs" / "kernels.md"

_ENTRY = re.compile(
    r"Function properties for (?P<name>\w+)\s+ptxas\s+\.\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes "
    r"spill stores, (?P<loads>\d+) bytes spill loads\s+ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Region:
    """A part of a kernel's text in which its time is spent."""

    what: str
    file: str
    begins: str
    """The line that begins it: a loop, a function, a block."""
    weights: float
    """That one thread handles in one pass."""
    times: str = ""
    """A macro of the kernel that multiplies the weights."""
    without: tuple[tuple[str, str], ...] = ()
    """Blocks inside (file, first line) that a usual pass does not take."""

    @property
    def loop(self) -> bool:
        """Whether one pass through a loop is counted."""
        return self.begins.startswith(("for ", "while "))


_TILE = "for (u32 j = 0; j < count; ++j) {"
_PATCH = ("tiles.cuh", "__device__ __forceinline__ void patch(")
_ELSEWHERE = ("fused_hopper.cu", "__device__ __forceinline__ void patch_elsewhere(")
_LEVEL2 = Region("level 2, per digit there", "planes_decode.cu", "for (u32 first = warp * kSlotGroups", 16)
_PLANES = (
    Region(
        "level 1 and the join, whole tiles, rows on 16 bytes", "planes_decode.cu",
        "__device__ __forceinline__ void decode_chunk(", 64,
        without=(
            ("planes_decode.cu", "struct TailWords {"),
            ("planes_decode.cu", "around: smem.tables[0] = place_exponents("),
            ("planes_decode.cu", "__device__ __forceinline__ void copy_tails("),
            ("planes_decode.cu", "__device__ __forceinline__ void expand_level3("),
            ("planes_decode.cu", "__device__ __forceinline__ void expand_level2("),
            ("planes_decode.cu", "around: if (number >= groups) break;"),
        ),
    ),
    _LEVEL2,
)  # fmt: skip
_DF11 = (
    Region("a look-up of 1 to 4 exponents", "df11.cuh", "while ((state & kWordEnd) == 0) {", 1),
    Region("exponents to their places", "df11.cuh", "for (u32 left = at < end ?", 4),
    Region("the join, aligned", "df11.cuh", "for (i32 i = kAhead * kThreads; i < vectors", 8),
)

REGIONS: dict[str, tuple[Region, ...]] = {
    "planes_index": (
        Region("digits of level 1", "planes_decode_index.cu", "for (u32 chunk = thread / kWarp", 256),
    ),
    "planes_decode": _PLANES,
    "planes_rows": (_LEVEL2,),
    "planes_count": (Region("a group", "planes_encode.cu", "for (u32 group = threadIdx.x / kGroupLanes", 16),),
    "planes_write": (Region("a step", "planes_encode.cu", "for (u32 step = 0; step < groups", 16),),
    "planes_widened": (
        Region("four rounds", "planes_encode_widened.cu", "for (u64 col = static_cast<u64>(blockIdx.x) * 256", 4),
    ),
    "tiles_decode": (
        Region("a tile, with up to 32 escapes", "tiles_decode.cu", _TILE, 32),
        Region("a tile without escapes", "tiles_decode.cu", _TILE, 32, without=(_PATCH,)),
    ),
    "tiles_rows": (
        Region(
            "512 columns, each loop once", "tiles_rows.cu", "tiles_rows(const u8* gmem_tiles", 16,
            without=(("tiles_rows.cu", "for (u32 col = lane; col < cols_left"),),
        ),
    ),
    "tiles_histogram": (Region("a vector", "tiles_pack.cu", "for (u64 i = thread; i < groups", 8),),
    "tiles_count": (Region("a tile", "tiles_pack.cu", "tiles_count(const u16* gmem_weights", 32),),
    "tiles_write": (Region("a tile", "tiles_pack.cu", "tiles_write(const u16* gmem_weights", 32),),
    "fused_linear": (
        Region(
            "a tile, all tokens, with up to 32 escapes", "fused_linear.cu", "for (u32 tile = chunk_begin", 32,
            "BITFORBIT_STRIPES",
        ),
        Region(
            "besides, once per BITFORBIT_STAGES tiles: x, lists of escapes", "fused_linear.cu", "for (u32 chunk_begin",
            32, "BITFORBIT_STRIPES",
            (
                ("fused_linear.cu", "for (u32 tile = chunk_begin"),
                ("fused_linear.cu", "for (u32 i = 0; i < 8; ++i) {"),
            ),
        ),
    ),
    "fused_hopper": (
        Region(
            "two tiles, all tokens, with up to 32 escapes each", "fused_hopper.cu", "for (; tile < ring_end", 64,
            without=(_ELSEWHERE,),
        ),
        Region(
            "besides, once per BITFORBIT_CHUNK tiles: x, lists of escapes", "fused_hopper.cu", "for (u32 chunk_begin",
            32, "BITFORBIT_CHUNK",
            (
                ("fused_hopper.cu", "for (; tile < ring_end"),
                ("fused_hopper.cu", "__device__ __forceinline__ void load_words("),
            ),
        ),
    ),
    "kv_attend": (
        Region(
            "128 tokens of a segment, keys and values, 8 queries", "kv_attend.cu",
            "__device__ __forceinline__ void attend_segment(", 8, "BITFORBIT_HEAD",
            (
                ("kv_attend.cu", "__device__ __forceinline__ void cap("),
                ("kv_attend.cu", "__device__ __forceinline__ void cut("),
                ("kv_attend.cu", "__device__ __forceinline__ void hide("),
            ),
        ),
        Region(
            "besides: the sums of a block's four warps", "kv_attend.cu",
            "__device__ __forceinline__ void store_item(", 8, "BITFORBIT_HEAD",
        ),
    ),
    "kv_flush": (
        Region("a word of keys", "kv_flush.cu", "for (u32 i = 0; i < kGroup; i += kWordTokens) {", 8),
        Region("a word of values", "kv_flush.cu", "for (u32 w = threadIdx.x; w < kWords; w += kThreads) {", 16),
    ),
    "df11_decode": _DF11,
    "df11_rows": _DF11,
}  # fmt: skip


def label(kernel: Kernel) -> str:
    """Name of a kernel with its macros: ``planes_decode BITFORBIT_KIND=0``."""
    return " ".join((kernel.name, *(f"{name}={value}" for name, value in kernel.defines)))


def digest(kernel: Kernel) -> str:
    """Of everything that a kernel's binaries depend on: its text without comments, its macros, the options."""
    lines = (line.split("//")[0].split() for line in sources.text(kernel.source).splitlines())
    code = [" ".join(words) for words in lines if words and words[0] != "#line"]
    return hashlib.sha256(repr((code, kernel.defines, compiler.OPTIONS)).encode()).hexdigest()[:16]


def resources(arch: str, binaries: registry.Binaries) -> dict[str, dict[str, int]]:
    """Registers, static shared memory, stack and spills (bytes) of kernels for an architecture."""

    def compiled(item: tuple[tuple[str, Any], tuple[Kernel, ...]]) -> dict[str, dict[str, int]]:
        (source, defines), kernels = item
        log = compiler.compile_with_log(sources.text(source), arch, defines, ["--ptxas-options=-v"], source)[1]
        found = {entry["name"]: entry for entry in _ENTRY.finditer(log)}
        numbers = {}
        for kernel in kernels:
            entry = found[kernel.name]
            shared = _SHARED.search(entry["rest"])
            numbers[label(kernel)] = {
                "registers": int(entry["registers"]),
                "shared": int(shared[1]) if shared else 0,
                "stack": int(entry["stack"]),
                "spills": int(entry["stores"]) + int(entry["loads"]),
            }
        return numbers

    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(compiled, binaries.items())
    return {name: numbers for part in parts for name, numbers in part.items()}


def counted(kernel: Kernel, function: sass.Function, region: Region) -> dict[str, int] | None:
    """Instructions of a region per pipe; None, and a word of warning, where the text no longer has it."""
    try:
        lines = sass.block_lines(region.file, region.begins)
        without = [sass.block_lines(file, begins) for file, begins in region.without]
        return sass.counted(function, lines, region.loop, without)
    except ValueError as error:
        print(f"{label(kernel)}, {region.what!r} is left out, bring REGIONS up to date: {error}", file=sys.stderr)
        return None


def instructions(binaries: registry.Binaries) -> dict[str, dict[str, Any]]:
    """Machine instructions of kernels: all, and of each of their regions by pipe."""
    found: dict[str, dict[str, Any]] = {}
    for (source, defines), kernels in binaries.items():
        cubin = compiler.compile(sources.text(source), COUNTED_ARCH, defines, ["-lineinfo"], source)
        functions = sass.disassemble(cubin)
        for kernel in kernels:
            function = functions[kernel.name]
            macros = dict(kernel.defines)
            regions = [
                {"what": region.what, "weights": region.weights * int(macros.get(region.times, 1)), **pipes}
                for region in REGIONS.get(kernel.name, ())
                if (pipes := counted(kernel, function, region)) is not None
            ]
            found[label(kernel)] = {"all": len(function.instructions), "regions": regions}
    return found


def measure(before: dict[str, Any]) -> dict[str, Any]:
    """Everything that the result file holds; what it holds of unchanged kernels is kept."""
    nvrtc = importlib.metadata.version("nvidia-cuda-nvrtc")
    known = before.get("kernels", {}) if before.get("nvrtc") == nvrtc else {}
    changed = {
        key: kernels
        for key, kernels in registry.binaries().items()
        if any(known.get(label(kernel), {}).get("digest") != digest(kernel) for kernel in kernels)
    }
    per_arch = {arch: resources(arch, changed) for arch in ARCHS}
    counts = instructions(registry.binaries())
    kernels = {}
    for kernel in registry.KERNELS:
        name = label(kernel)
        if name in per_arch[COUNTED_ARCH]:
            numbers = {arch: per_arch[arch][name] for arch in ARCHS}
        else:
            numbers = known[name]["resources"]
        kernels[name] = {"digest": digest(kernel), "resources": numbers, "instructions": counts[name]}
    return {"benchmark": "kernels", "nvrtc": nvrtc, "options": list(compiler.OPTIONS), "kernels": kernels}


def recorded() -> dict[str, Any]:
    """The tracked results."""
    results: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    return results


def render(results: dict[str, Any]) -> str:
    """The tables of the page."""
    rows, counted = [], []
    for name, numbers in results["kernels"].items():
        per_arch = [numbers["resources"][arch] for arch in ARCHS]
        shared = sorted({entry["shared"] for entry in per_arch})
        spills = {arch: numbers["resources"][arch]["spills"] for arch in ARCHS}
        rows.append(
            [
                f"`{name}`",
                *(str(entry["registers"]) for entry in per_arch),
                " / ".join(map(str, shared)),
                ", ".join(f"{arch}: {count}" for arch, count in spills.items() if count) or "none",
                str(numbers["instructions"]["all"]),
            ]
        )
        for region in numbers["instructions"]["regions"]:
            total = sum(region[pipe] for pipe in sass.PIPES)
            per_weight = [f"{count / region['weights']:.2f}" for count in (total, *(region[p] for p in sass.PIPES))]
            counted.append([f"`{name}`", region["what"], f"{region['weights']:g}", str(total), *per_weight])
    heads = ["kernel", *ARCHS, "shared", "spills", f"instructions, {COUNTED_ARCH}"]
    second = table(["kernel", "region", "weights per pass", "instructions", "per weight", *sass.PIPES], counted)
    return f"## Resources\n\n{table(heads, rows)}\n\n## Instructions per weight, {COUNTED_ARCH}\n\n{second}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the result file and the page's tables")
    arguments = parser.parse_args()
    results = measure(recorded())
    text = render(results)
    if not arguments.write:
        print(text)
        return
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    begin, end = "<!-- tables -->\n", "<!-- end -->"
    page = PAGE.read_text()
    head, tail = page[: page.index(begin) + len(begin)], page[page.index(end) :]
    PAGE.write_text(f"{head}\nNVRTC {results['nvrtc']}.\n\n{text}\n{tail}")


if __name__ == "__main__":
    main()
