"""What a quantized layer returns in place of keys and values: only our attention can do something with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from bitforbit.errors import KvCacheError

if TYPE_CHECKING:
    from bitforbit.integrations.transformers.kv.cache import KiviLayer

_OTHER_ATTENTION = (
    "expected the attention bitforbit_kivi, which reads a quantized cache, got an operation on its keys and values as "
    "if they were tensors; make the cache with bitforbit.kivi_cache(model), which sets the model's attention. If it is "
    "set, this architecture does more with keys and values than a quantized cache allows"
)


def _refuse(*_: object, **__: object) -> NoReturn:
    raise KvCacheError(_OTHER_ATTENTION)


class KvHandle:
    """Stands for the keys and values of a layer after a call's tokens were added.

    ``handle_keys``, ``handle_values``: the call's own tensors ``[B, H, q, D]``; ``handle_first``: nothing came before
    them. Everything that a tensor can do raises KvCacheError.
    """

    __slots__ = ("handle_done", "handle_first", "handle_keys", "handle_layer", "handle_values")

    def __init__(self, layer: KiviLayer, keys: torch.Tensor, values: torch.Tensor, *, first: bool) -> None:
        self.handle_layer, self.handle_first = layer, first
        self.handle_keys: torch.Tensor | None = keys
        self.handle_values: torch.Tensor | None = values
        self.handle_done = False

    def finish(self) -> None:
        """Let go of the call's tensors: attention has run."""
        self.handle_keys = self.handle_values = None
        self.handle_done = True

    def __getattr__(self, name: str) -> Any:
        _refuse()

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> Any:
        _refuse()


# Python looks these up on the class, past __getattr__.
_OPERATORS = """
    len bool iter getitem setitem contains float int index array add radd iadd sub rsub isub mul rmul imul truediv
    rtruediv floordiv mod pow rpow matmul rmatmul neg pos abs invert lt le gt ge and or xor
"""
_NAMES = _OPERATORS.split()
for _name in _NAMES:
    setattr(KvHandle, f"__{_name}__", _refuse)
