"""Kernels of ``probe.cu``, which show what the launcher does."""

from __future__ import annotations

from pathlib import Path

from bitforbit.cuda.kernel import F32, I32, U32, U64, Kernel, LaunchConfig, Pointer

TEXT = str(Path(__file__).with_name("probe.cu"))
PARAMETERS = Kernel("probe_parameters", TEXT, (Pointer, U32, I32, U64, F32))
SCALE = Kernel("probe_scale", TEXT, (Pointer, U32, U32, U32))
REVERSE = Kernel("probe_reverse", TEXT, (Pointer, U32))


def scale_config(count: int) -> LaunchConfig:
    """For so many words."""
    return LaunchConfig.linear(-(-count // 256), 256)
