"""Where a model is to run, and in which layout its weights are kept there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from bitforbit.errors import GpuUnavailableError, UsageError
from bitforbit.integrations.options import RUNTIMES


@dataclass(frozen=True)
class Place:
    """``device``: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"gpus"`` for all of this machine's (accelerate decides)."""

    device: str = "cpu"
    runtime: str = "auto"

    @property
    def on_gpu(self) -> bool:
        """Whether the weights go to a GPU."""
        return self.device != "cpu"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for ``from_pretrained``. Without accelerate, models are moved after loading: :meth:`settle`."""
        if not self.on_gpu or not _has_accelerate():
            return {}
        return {"device_map": "auto" if self.device == "gpus" else {"": self.device}}

    @property
    def config(self) -> dict[str, Any]:
        """Arguments for ``BitforbitConfig``."""
        moved_later = self.on_gpu and not _has_accelerate()
        return {"runtime": "auto" if moved_later and self.runtime == "tiles" else self.runtime}

    def settle(self, model: Any) -> Any:
        """The model where it is to run, and ready there."""
        if not self.on_gpu:
            return model
        if not _has_accelerate():
            model = model.to("cuda" if self.device == "gpus" else self.device)
        torch.cuda.synchronize()
        return model


CPU = Place()


def _has_accelerate() -> bool:
    return find_spec("accelerate") is not None


def choose(device: str = "auto", runtime: str = "auto") -> Place:
    """The place that options name; ``"auto"`` takes the GPUs of this machine if compressed weights can be used there.

    Raises UsageError, or GpuUnavailableError, which says why, if a GPU is asked for and cannot be used.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"--runtime: expected one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if device == "auto":
        device = "gpus" if _usable() else "cpu"
    elif device.startswith("cuda"):
        if not re.fullmatch(r"cuda(:\d+)?", device):
            raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, got {device!r}")
        _require(torch.device(device))
    elif device != "cpu":
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    if device == "cpu" and runtime in ("tiles", "df11"):
        raise UsageError(f"--runtime {runtime}: expected a GPU, got --device cpu; leave it out, or use --device cuda")
    return Place(device, runtime)


def _usable() -> bool:
    try:
        _require(torch.device("cuda"))
    except GpuUnavailableError:
        return False
    return True


def _require(device: torch.device) -> None:
    from bitforbit.integrations.runtime import require_gpu

    require_gpu(device)
