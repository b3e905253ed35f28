"""The tensors of the plain checkpoint that a compressed model stands for: shapes at once, values on demand."""

from __future__ import annotations

import torch
from torch import nn

from bitforbit.errors import UsageError
from bitforbit.nn import CompressedSpec, compressed_parameters, part_name
from bitforbit.nn.values import decode


class Originals:
    """The tensors of one model, in the order of the plain model's state dict."""

    def __init__(self, model: nn.Module) -> None:
        """Raises UsageError for what is no tensor."""
        self.shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, (dtype, shape) in _own(module).items():
                path = f"{prefix}.{name}" if prefix else name
                self.shapes[path] = dtype, shape
                self._places[path] = module, name

    def is_compressed(self, name: str) -> bool:
        """Whether the model holds the tensor in compressed form."""
        module, own = self._places[name]
        return own in compressed_parameters(module)

    def value(self, name: str) -> torch.Tensor:
        """A tensor, contiguous, in CPU memory. Raises UsageError for one that has no values."""
        module, own = self._places[name]
        spec = compressed_parameters(module).get(own)
        if spec is None:
            return _loaded(module, own, name).cpu().contiguous()
        # Parts on a GPU are decoded there.
        parts = [_loaded(module, part_name(part, own), name) for part in spec.part_names]
        return decode(spec, parts).cpu().contiguous()


def _own(module: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    specs: dict[str, CompressedSpec] = compressed_parameters(module)
    parts = {part_name(part, name) for name, spec in specs.items() for part in spec.part_names}
    # Compressed parameters come first: they are weights, and the others biases, in nearly all modules.
    own = {name: (spec.dtype, tuple(spec.shape)) for name, spec in specs.items()}
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None and name not in parts and name not in module._non_persistent_buffers_set:
            own[name] = value.dtype, tuple(value.shape)
    return own


def _loaded(module: nn.Module, name: str, path: str) -> torch.Tensor:
    value = module._parameters[name] if name in module._parameters else module._buffers[name]
    assert value is not None
    if value.is_meta:
        hook = getattr(module, "_hf_hook", None)
        offloaded = getattr(hook, "weights_map", None)
        if offloaded is None:
            raise UsageError(f"expected {path} to have values, got a tensor on the meta device; it cannot be saved")
        value = offloaded[name]
    return value.detach()
