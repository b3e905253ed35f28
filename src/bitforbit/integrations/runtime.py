"""Where a model's parameters go, in which layout, and how much memory that takes: what loading plans with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from bitforbit.errors import GpuUnavailableError, UsageError

if TYPE_CHECKING:
    from bitforbit.nn import CompressedSpec

# Nothing here may be imported from bitforbit.nn at once: this module is imported while transformers still is.

DISK = "disk"


def devices(device_map: Any) -> list[torch.device | str]:
    """The devices that a device map names, in order, ``"disk"`` among them; none if it is yet to be made."""
    values = device_map.values() if isinstance(device_map, dict) else ()
    return [each if each == DISK else _device(each) for each in dict.fromkeys(values)]


def _device(value: Any) -> torch.device:
    return torch.device("cuda", value) if isinstance(value, int) else torch.device(value)


def check_devices(places: Iterable[torch.device | str], runtime: str) -> None:
    """Raise UsageError for devices that compressed models do not run on, or not in this runtime.

    Raises GpuUnavailableError, which says why, for a GPU that cannot be used.
    """
    from bitforbit.nn import layout

    places = list(places)
    gpus = [place for place in places if isinstance(place, torch.device) and layout.is_gpu(place)]
    for place in places:
        if place != DISK and place not in gpus and torch.device(place).type != "cpu":
            raise UsageError(
                f"expected a device_map of 'cpu', 'cuda' devices and 'disk' only, got {place}; compressed models run "
                "on CPUs and on NVIDIA GPUs"
            )
    for gpu in gpus:
        require_gpu(gpu)
    if not places:
        return
    if runtime in ("tiles", "df11") and not gpus:
        raise UsageError(
            f"expected a GPU for runtime={runtime!r}, got {', '.join(map(str, places))}; pass device_map='cuda', or "
            "runtime='auto', which runs on any device"
        )
    if runtime == "df11" and len(gpus) < len(places):
        raise UsageError(
            f"expected all of the model on GPUs for runtime='df11', got {', '.join(map(str, places))}; runtime='auto' "
            "runs models of which parts are on the CPU or on disk"
        )


def require_gpu(device: torch.device) -> None:
    """Raise GpuUnavailableError, which says why, if compressed weights cannot be used on a CUDA device."""
    if device.type != "cuda":
        return
    from bitforbit.cuda.device import require

    require(device.index or 0)
    if not torch.cuda.is_available():
        raise GpuUnavailableError(
            f"expected a torch that can use the GPU, got torch {torch.__version__} without CUDA; install one that is "
            "built for CUDA (pytorch.org); the CPU works with this one"
        )


# --- memory ---------------------------------------------------------------------------------------------------------


def tiles_share(spec: CompressedSpec, nbytes: int) -> float:
    """Bytes of a parameter as tiles, as is to be expected, per byte of its planes; at least 1, and 1 without a GPU."""
    from bitforbit.nn import gpu_specs, layout

    here = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    if not any(map(layout.is_gpu, here)):
        return 1.0
    if spec.layout != "planes" or spec.dtype not in gpu_specs.TILES_KINDS or not nbytes:
        return 1.0
    return max(1.0, min(spec.nbytes, gpu_specs.expected_tiles_bytes(*spec.matrix_shape(), spec.dtype)) / nbytes)


def compressed_element_size(tensor: torch.Tensor) -> float:
    """Bytes per element to be expected of a tensor that is to be compressed."""
    from bitforbit.codecs.planes.layout import matrix_view
    from bitforbit.nn import gpu_specs

    if tensor.dtype not in gpu_specs.TILES_KINDS or not tensor.numel():
        return float(tensor.element_size())
    expected = gpu_specs.expected_tiles_bytes(*matrix_view(tuple(tensor.shape)), tensor.dtype)
    return min(float(tensor.element_size()), expected / int(tensor.numel()))
