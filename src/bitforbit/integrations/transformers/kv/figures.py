"""What a cache takes, counted from its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitforbit.integrations.transformers.kv.cache import KiviLayer


@dataclass(frozen=True)
class CacheFigures:
    """Memory of a cache with ``tokens`` slots of ``rows`` rows. ``elements``: numbers that it holds, keys and values.

    ``num_bytes`` is what its tensors take, windows, scales and unused room included.
    """

    rows: int
    tokens: int
    num_bytes: int
    elements: int
    quantized_layers: int
    layers: int

    @property
    def bytes_per_token(self) -> float | None:
        """Of one row's token, over all layers."""
        return self.num_bytes / (self.rows * self.tokens) if self.rows * self.tokens else None

    @property
    def bits_per_element(self) -> float | None:
        """16 for a BF16 cache without unused room."""
        return 8 * self.num_bytes / self.elements if self.elements else None

    def to_json(self) -> dict[str, Any]:
        """Every field, and what follows from them."""
        return {
            **asdict(self),
            "bytes_per_token": self.bytes_per_token,
            "bits_per_element": self.bits_per_element,
        }


def figures(cache: Any) -> CacheFigures:
    """Count a cache of transformers, quantized or not."""
    layers = list(cache.layers)
    shapes = [_shape(layer) for layer in layers]
    return CacheFigures(
        rows=max((rows for rows, _, _ in shapes), default=0),
        tokens=max((tokens for _, tokens, _ in shapes), default=0),
        num_bytes=sum(layer_bytes(layer) for layer in layers),
        elements=sum(elements for _, _, elements in shapes),
        quantized_layers=sum(isinstance(layer, KiviLayer) for layer in layers),
        layers=len(layers),
    )


def layer_bytes(layer: Any) -> int:
    """Bytes of a layer's tensors: of what they are views of, which is what they keep in memory."""
    if isinstance(layer, KiviLayer):
        return layer.nbytes
    storages = {}
    for tensor in _tensors(vars(layer)):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _shape(layer: Any) -> tuple[int, int, int]:
    """Rows, tokens and elements of a layer."""
    if isinstance(layer, KiviLayer):
        state = layer.state
        if state is None:
            return 0, 0, 0
        return state.batch, state.slots, 2 * state.batch * state.heads * state.head_dim * state.slots
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or not keys.numel():
        return 0, 0, sum(tensor.numel() for tensor in _tensors(vars(layer)))
    return keys.shape[0], int(layer.get_seq_length()), keys.numel() + values.numel()
