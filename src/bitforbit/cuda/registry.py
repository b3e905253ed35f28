"""All kernels of the package, for those who compile them ahead, count their instructions or test every one."""

from __future__ import annotations

from bitforbit.cuda import df11, sources
from bitforbit.cuda.fused import plan as fused
from bitforbit.cuda.kernel import Kernel
from bitforbit.cuda.kv import usual as kv
from bitforbit.cuda.planes import decode as planes_decode
from bitforbit.cuda.planes import encode as planes_encode
from bitforbit.cuda.tiles import decode as tiles_decode
from bitforbit.cuda.tiles import pack as tiles_pack

KERNELS: tuple[Kernel, ...] = (
    *planes_decode.KERNELS,
    *planes_encode.KERNELS,
    *tiles_pack.KERNELS,
    *tiles_decode.KERNELS,
    *df11.KERNELS,
    *fused.KERNELS,
    *kv.KERNELS,
)

STACK: dict[Kernel, str] = {
    variant.kernel: "sums of 64 tokens fill the registers: ptxas spills a few of them on sm_100a and sm_120a"
    for variant in fused.VARIANTS
    if (variant.tokens, variant.stripes) == (64, 1)
}
"""Kernels that may have a stack frame in local memory, with the reason."""


Binaries = dict[tuple[str, tuple[tuple[str, str], ...]], tuple[Kernel, ...]]
"""Kernels by what is compiled at once: a text and its macros."""


def binaries() -> Binaries:
    """All kernels by what is compiled at once."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[Kernel]] = {}
    for kernel in KERNELS:
        found.setdefault((kernel.source, kernel.defines), []).append(kernel)
    return {key: tuple(kernels) for key, kernels in found.items()}


def missing() -> list[str]:
    """Entry points of texts in ``kernels/`` that no kernel of the list names: expected none."""
    named = {(kernel.source, kernel.name) for kernel in KERNELS}
    texts = sorted(path.name for path in sources.KERNELS.glob("*.cu"))
    return [f"{text}: {name}" for text in texts for name in sources.entry_points(text) if (text, name) not in named]
