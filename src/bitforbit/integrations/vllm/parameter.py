"""Weights of vLLM's layers: on the meta device until they are loaded, compressed from then on.

A layer's compressed weight ``w`` is parameters ``code__w``, ... (the parts, uint8 ``[nbytes]``) and an attribute
``bitforbit_specs["w"]`` that says how to read them. vLLM has sharded it before: it is what this process needs. For
code that looks at a layer's weight, as that of LoRA does, a matrix ``w`` stays there, lazy: decoded if it is used.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing

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
    return True


def compress(layer: nn.Module, name: str) -> bool:
    """Put the compressed form in the place of a parameter; False if it is left plain, since that does not pay.

    Where weights are loaded anew, raises CompressedParameterError if captured graphs would go on using the old ones.
    """
    before = spec_of(layer, name)
    made = compressed(layer._parameters[name].detach())
    if made is None:
        layer.__dict__.get(_SPECS, {}).pop(name, None)
        _keep_new(layer, name, before != None)
        return False
    spec, parts = made
    del layer._parameters[name]
    for part in spec.part_names:
        layer.register_parameter(part_name(part, name), nn.Parameter(parts[part], requires_grad=False))
    layer.__dict__.setdefault(_SPECS, {})[name] = spec
    if len(spec.shape) == 2:
        layer.__dict__[name] = LazyTensor.of(_LayerWeight(layer, name, spec))
    _keep_new(layer, name, spec != before)
    return True


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
