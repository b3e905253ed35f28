"""GPUs by name: memory and bandwidth from the makers' data sheets.

Memory: a data sheet's "80 GB" are 80 * 2^30 bytes of chips. Bandwidths are the data sheets' too; no program reaches
them. So is the link to the host: 16 lanes of PCIe, of which the data sheets give both directions together. Sources:
NVIDIA's data sheets of H200, H100 (SXM, PCIe, NVL), A100 (40 and 80 GB), L40S, L4, A10, RTX A6000, RTX A5000, RTX 6000
Ada; of HGX B200 for B200; the product pages of the GeForce cards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitforbit.errors import PlanError
from bitforbit.iomodel.machine import Level, Machine

_GIB = 1 << 30
PCIE4, PCIE5 = 3.2e10, 6.4e10
"""Bytes per second over 16 lanes of PCIe, in one direction."""


@dataclass(frozen=True)
class Gpu:
    """A device: ``memory`` in bytes, its ``bandwidth`` in bytes per second, None if unknown.

    ``tiles``: compressed weights lie there as tiles, as on GPUs, not as planes, as on CPUs. ``link``: bytes per second
    from host memory, None if unknown.
    """

    name: str
    memory: int
    bandwidth: float | None = None
    tiles: bool = True
    link: float | None = None

    @property
    def machine(self) -> Machine:
        """The device as the I/O model sees it: one memory."""
        return Machine(self.name, (Level("memory", self.memory, bandwidth=self.bandwidth),), "memory")


GPUS = (
    Gpu("B200", 180 * _GIB, 8.0e12, link=PCIE5),
    Gpu("H200", 141 * _GIB, 4.8e12, link=PCIE5),
    Gpu("H100", 80 * _GIB, 3.35e12, link=PCIE5),
    Gpu("H100-PCIe", 80 * _GIB, 2.0e12, link=PCIE5),
    Gpu("H100-NVL", 94 * _GIB, 3.9e12, link=PCIE5),
    Gpu("A100", 80 * _GIB, 2.039e12, link=PCIE4),
    Gpu("A100-PCIe", 80 * _GIB, 1.935e12, link=PCIE4),
    Gpu("A100-40GB", 40 * _GIB, 1.555e12, link=PCIE4),
    Gpu("L40S", 48 * _GIB, 8.64e11, link=PCIE4),
    Gpu("L4", 24 * _GIB, 3.0e11, link=PCIE4),
    Gpu("A10", 24 * _GIB, 6.0e11, link=PCIE4),
    Gpu("A6000", 48 * _GIB, 7.68e11, link=PCIE4),
    Gpu("A5000", 24 * _GIB, 7.68e11, link=PCIE4),
    Gpu("RTX6000Ada", 48 * _GIB, 9.6e11, link=PCIE4),
    Gpu("RTX5090", 32 * _GIB, 1.792e12, link=PCIE5),
    Gpu("RTX4090", 24 * _GIB, 1.008e12, link=PCIE4),
    Gpu("RTX4080", 16 * _GIB, 7.168e11, link=PCIE4),
    Gpu("RTX3090", 24 * _GIB, 9.36e11, link=PCIE4),
)
"""Those that bitforbit's kernels are for (compute capability 8.0 and newer)."""

_UNITS = {"mb": 10**6, "mib": 1 << 20, "g": 10**9, "gb": 10**9, "gib": _GIB, "tb": 10**12, "tib": 1 << 40}
_SIZE = re.compile(rf"(?P<number>\d+(\.\d+)?)\s*(?P<unit>{'|'.join(_UNITS)})", re.IGNORECASE)
_CPU_SIZE = re.compile(r"cpu(:(?P<size>.+))?", re.IGNORECASE)


def find_gpu(text: str) -> Gpu:
    """A GPU by name ("H100", "4090"), by size ("80GB" is 80 * 10^9 bytes, "80GiB" 80 * 2^30), or "CPU:16GB".

    Raises PlanError, which lists the names.
    """
    cpu = _CPU_SIZE.fullmatch(text.strip())
    if cpu is not None:
        size = parse_size(cpu["size"])
        if cpu["size"] is not None and size is None:
            raise PlanError(f"--gpu: expected a size such as CPU:16GB, got {text!r}")
        return Gpu("CPU", size or _this_memory(), tiles=False)
    nbytes = parse_size(text)
    if nbytes is not None:
        return Gpu(text.strip(), nbytes)
    wanted = _plain(text)
    for gpu in GPUS:
        if wanted in (_plain(gpu.name), _plain(gpu.name).removeprefix("rtx")):
            return gpu
    names = ", ".join(gpu.name for gpu in GPUS)
    raise PlanError(
        f"--gpu: expected one of {names}, CPU, or a size such as 80GB, got {text!r}; `--gpu list` shows them"
    )


def parse_size(text: str | None) -> int | None:
    """Bytes of ``"80GB"``, ``"80GiB"``, ``"500MB"``, ``"1TB"``; None if it is no such size."""
    match = _SIZE.fullmatch((text or "").strip())
    if match is None:
        return None
    return int(float(match["number"]) * _UNITS[match["unit"].lower()]) or None


def _this_memory() -> int:
    from bitforbit.iomodel.machine import this_cpu

    return this_cpu().levels[-1].nbytes


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
