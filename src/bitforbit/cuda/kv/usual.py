"""The kernels for usual settings: those that are compiled ahead, counted and tested; there are hundreds of others."""

from __future__ import annotations

from bitforbit.cuda.kernel import Kernel
from bitforbit.cuda.kv.attend import kernels
from bitforbit.cuda.kv.call import defines
from bitforbit.cuda.kv.flush import kernel

BITS = ((4, 4), (4, 2), (2, 2))
"""Of keys and values."""
SETTINGS = tuple(defines(128, k_bits, v_bits, 32, 32) for k_bits, v_bits in BITS)
KERNELS: tuple[Kernel, ...] = (
    *(kernels(each)[0] for each in SETTINGS),
    kernels(SETTINGS[0])[1],
    kernel(SETTINGS[1], "BF16"),
)
