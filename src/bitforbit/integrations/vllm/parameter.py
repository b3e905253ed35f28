"""Weights of vLLM's layers: on the meta device until they are loaded, compressed from then on.

A layer's compressed weight ``w`` is parameters ``code__w``, ... (the parts, uint8 ``[nbytes]``) and an attribute
``bitforbit_specs["w"]`` that says how to read them. vLLM has sharded it before: it is what this process needs. For
code that looks at a layer's weight, as that of LoRA does, a matrix ``w`` stays there, lazy: decoded if it is used.
"""

from __future__ import annotations

import weakref
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.model_loader.reload.sanitize import layer_ref_sentinel

from bitforbit.errors import CompressedParameterError, MissingTensorError
from bitforbit.integrations.vllm.lazy import LazyTensor, Range, Whole
from bitforbit.nn.parameters import compressed
from bitforbit.nn.spec import CompressedSpec, part_name

_SPECS = "bitforbit_specs"
_NAME = "bitforbit_name"
_DONE = "_already_called_process_weights_after_loading"
"""vLLM's own mark of layers whose weights have been processed; it removes the mark before weights are loaded again."""


def register(layer: nn.Module, prefix: str) -> None:
    """Let compiled graphs find the layer by its name: they hold no weight, and no choice that depends on one.

    vLLM keeps such graphs for later starts, with files of other contents and in other modes as well.
    """
    config = get_current_vllm_config_or_none()
    layers = {} if config is None else config.compilation_config.static_forward_context
    name = f"bitforbit.{prefix}"
    if config is not None and prefix and name not in layers:
        layers[name] = layer
        layer.__dict__[_NAME] = name


def name_of(layer: nn.Module) -> str | None:
    """What the layer is called in compiled graphs; None if it is not known to them."""
    name: str | None = layer.__dict__.get(_NAME)
    return name


def create_on_meta(create: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Call vLLM's ``create_weights`` without memory for them: layers get it in turn, when they are loaded."""
    with torch.device("meta"):
        create(layer, *args, **kwargs)
    initialize_online_processing(layer)


def is_new(layer: nn.Module, prefix: str) -> bool:
    """Whether the weights of a layer have just been loaded; marks them as processed.

    Raises MissingTensorError if no file had a tensor for them.
    """
    if getattr(layer, _DONE, False):
        return False
    config = get_current_vllm_config_or_none()
    dummy = config is not None and config.load_config.load_format == "dummy"
    if get_layerwise_info(layer).load_numel == 0 and not dummy:
        raise MissingTensorError(f"{prefix}: expected the checkpoint to hold its weights, got none; fetch it again")
    setattr(layer, _DONE, True)
    prepare_reload(layer)
    return True


def prepare_reload(layer: nn.Module) -> None:
    """Let what vLLM remembers of a layer's parameters name the loader of the layer itself.

    It remembers the one that was wrapped for loading: this holds the layer, which would never be freed, and is that of
    the embeddings for a head that shares their parameter.
    """
    for tensor in get_layerwise_info(layer).restore_metadata[0].values():
        loader: Any = getattr(tensor, "weight_loader", None)
        while getattr(loader, "__name__", "") == "online_process_loader":
            loader = loader.__wrapped__
        if isinstance(loader, MethodType) and loader.__self__ is not layer_ref_sentinel:
            loader = MethodType(loader.__func__, layer_ref_sentinel)
        if loader is not None:
            tensor.weight_loader = loader


def compress(layer: nn.Module, name: str) -> bool:
    """Put the compressed form in the place of a parameter; False if it is left plain, since that does not pay.

    Where weights are loaded anew, raises CompressedParameterError if captured graphs would go on using the old ones.
    """
    before = spec_of(layer, name)
    made = compressed(layer._parameters[name].detach())
    specs = layer.__dict__.setdefault(_SPECS, {})
    specs.pop(name, None)
    if made is not None:
        specs[name], parts = made
        del layer._parameters[name]
        for part in specs[name].part_names:
            layer.register_parameter(part_name(part, name), nn.Parameter(parts[part], requires_grad=False))
        if len(specs[name].shape) == 2:
            layer.__dict__[name] = LazyTensor.of(_LayerWeight(layer, name))
    _replace_old(layer, name, before)
    return made is not None


def is_same(layer: nn.Module, other: nn.Module, name: str = "weight") -> bool:
    """Whether two layers hold the same bytes for a compressed weight."""
    spec = spec_of(layer, name)
    if spec is None or spec != spec_of(other, name):
        return False
    pairs = zip(parts_of(layer, spec, name), parts_of(other, spec, name), strict=True)
    return all(torch.equal(own, same) for own, same in pairs)


def drop(layer: nn.Module, name: str = "weight") -> None:
    """Forget a weight, compressed or not."""
    for key in _names(layer.__dict__.get(_SPECS, {}).pop(name, None), name):
        layer._parameters.pop(key, None)


def _replace_old(layer: nn.Module, name: str, before: CompressedSpec | None) -> None:
    """Make vLLM use the new form of a weight that was loaded anew; it would copy it to where the old one is."""
    info = get_layerwise_info(layer)
    if info.kernel_tensors is None:
        return
    old, buffers = info.kernel_tensors
    spec = spec_of(layer, name)
    new = {key: layer._parameters[key] for key in _names(spec, name)}
    if spec == before and all(key in old and old[key].shape == value.shape for key, value in new.items()):
        return
    config = get_current_vllm_config_or_none()
    graphs = config is not None and config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
    if graphs and not next(iter(new.values())).is_cpu:
        raise CompressedParameterError(
            f"{name} of {type(layer).__name__}: expected weights that compress to as many bytes as those before, since "
            "captured CUDA graphs read them where they are; start a new engine, or set enforce_eager to load others"
        )
    stale = _names(before, name)
    info.kernel_tensors = ({key: value for key, value in old.items() if key not in stale} | new, buffers)


def _names(spec: CompressedSpec | None, name: str) -> list[str]:
    return [name] if spec is None else [part_name(part, name) for part in spec.part_names]


class _LayerWeight(Whole):
    """The compressed matrix of a layer."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        spec = spec_of(layer, name)
        assert spec is not None
        self.shape, self.dtype = spec.shape, spec.dtype
        self.device = parts_of(layer, spec, name)[0].device
        self._layer = weakref.ref(layer)
        self._name = name

    def read(self, rows: Range, columns: Range) -> torch.Tensor:
        """See :class:`Whole`. Raises CorruptTensorError."""
        layer = self._layer()
        assert layer is not None
        spec = spec_of(layer, self._name)
        assert spec is not None
        block = spec.decode(parts_of(layer, spec, self._name), *rows)
        return block[:, slice(*columns)].contiguous()

    def refuse_write(self) -> None:
        """Raise CompressedParameterError."""
        raise CompressedParameterError(
            f"{self._name}: expected no write to a compressed weight; load others with the engine's reload_weights"
        )


def spec_of(layer: nn.Module, name: str = "weight") -> CompressedSpec | None:
    """How to read the parts of a weight; None if it is plain."""
    spec: CompressedSpec | None = layer.__dict__.get(_SPECS, {}).get(name)
    return spec


def parts_of(layer: nn.Module, spec: CompressedSpec, name: str = "weight") -> tuple[torch.Tensor, ...]:
    """The parts of a compressed weight, in the order that its spec wants."""
    return tuple(getattr(layer, part_name(part, name)) for part in spec.part_names)


def decode(layer: nn.Module, spec: CompressedSpec, name: str = "weight") -> torch.Tensor:
    """The plain weight, of the shape that it had."""
    return spec.decode(parts_of(layer, spec, name), 0, spec.matrix_shape()[0]).view(spec.shape)
