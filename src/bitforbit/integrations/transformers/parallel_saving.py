"""Saving a model that is split over processes: process 0 writes the checkpoint, the others send it their parts.

Process 0 asks for one parameter after the other, by its number, as it writes them; a parameter is whole in memory only
while it is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bitforbit.errors import WorkerError
from bitforbit.integrations.names import is_compressed
from bitforbit.integrations.transformers.originals import Originals, decoded
from bitforbit.integrations.transformers.parallel import Sharding, like

_DONE, _FAILED = -1, -2


class GatheredOriginals(Originals):
    """The tensors that the parts of all processes make up. Used in process 0, while the others are in :func:`serve`."""

    def __init__(self, model: PreTrainedModel, as_in_checkpoint: bool, sharding: Sharding) -> None:
        self._sharding = sharding
        self._names = _split_names(model, sharding)
        self._lock = threading.Lock()
        super().__init__(model, as_in_checkpoint)

    def _empty(self, name: str) -> torch.Tensor:
        whole = _whole(self._model, self._sharding, name)
        if whole is None:
            return super()._empty(name)
        return torch.empty(whole.shape, dtype=whole.dtype, device="meta")

    def _parameter(self, name: str) -> torch.Tensor:
        if name not in self._names:
            return super()._parameter(name)
        with self._lock:  # one conversation at a time
            _say(self._names.index(name), self._sharding)
            return _gathered(self._model, self._sharding, name).cpu()


def save_together(sharding: Sharding, model: PreTrainedModel, write: Callable[[], None]) -> None:
    """Run ``write`` in process 0 and serve it in the others: every process must call this.

    Raises what ``write`` raises, and in the other processes WorkerError if it failed.
    """
    if sharding.rank != 0:
        serve(model, sharding)
        return
    try:
        write()
    except BaseException:
        _say(_FAILED, sharding)
        raise
    _say(_DONE, sharding)


def serve(model: PreTrainedModel, sharding: Sharding) -> None:
    """Send parts of parameters as long as process 0 asks for them. Raises WorkerError if it fails."""
    names = _split_names(model, sharding)
    while (index := _hear(sharding)) != _DONE:
        if index == _FAILED:
            raise WorkerError("process 0 could not save the model; its own error says why")
        _gathered(model, sharding, names[index])


def _say(index: int, sharding: Sharding) -> None:
    dist.broadcast(torch.tensor(index, device=sharding.device), 0)


def _hear(sharding: Sharding) -> int:
    heard = torch.tensor(0, device=sharding.device)
    dist.broadcast(heard, 0)
    return int(heard)


def _split_names(model: PreTrainedModel, sharding: Sharding) -> list[str]:
    """Parameters of which processes hold parts, in an order that they share."""
    plain = (name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor))
    return sorted({*plain, *sharding.placeholders})


def _whole(model: PreTrainedModel, sharding: Sharding, name: str) -> DTensor | None:
    """A DTensor that says how a parameter is split; None if it is not."""
    if is_compressed(model, name):
        return sharding.placeholders.get(name)
    parameter = model.get_parameter_or_buffer(name)
    return parameter if isinstance(parameter, DTensor) else None


def _gathered(model: PreTrainedModel, sharding: Sharding, name: str) -> torch.Tensor:
    part = decoded(model, name)
    parts = part if isinstance(part, DTensor) else like(sharding.placeholders[name], part)
    whole: torch.Tensor = parts.full_tensor()
    return whole
