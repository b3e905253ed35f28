"""Memory whose contents are replaced while a model runs, such as that which blocks of a large model pass through.

Nothing is remembered of weights in such memory, and none of them is decoded ahead: whoever refills it waits for the
work of the stream that used it, and knows nothing of side streams.
"""

from __future__ import annotations

import threading

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_storages: dict[int, StorageWeakRef] = {}
"""By number. While an entry exists, no other storage has its number."""
_lock = threading.Lock()


def declare(memory: torch.Tensor) -> None:
    """Say that a tensor's storage is such memory, as long as it exists."""
    storage = StorageWeakRef(memory.untyped_storage())
    with _lock:
        for number, known in list(_storages.items()):
            if known.expired():
                del _storages[number]
        _storages[storage.cdata] = storage


def holds(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in such memory."""
    return bool(_storages) and tensor.untyped_storage()._cdata in _storages
