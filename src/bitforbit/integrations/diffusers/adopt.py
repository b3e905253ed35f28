"""Models of diffusers that were compressed after loading."""

from __future__ import annotations

from diffusers import ModelMixin

from bitforbit.integrations import first
from bitforbit.integrations.diffusers import saving
from bitforbit.integrations.diffusers.config import BitforbitConfig
from bitforbit.integrations.diffusers.quantizer import BitforbitQuantizer


def is_ours(model: ModelMixin) -> bool:
    """Whether the model was loaded, or adopted, as a compressed one."""
    return isinstance(getattr(model, "hf_quantizer", None), BitforbitQuantizer)


def adopt(model: ModelMixin, mode: str) -> None:
    """Make a model in which parameters have been compressed what ``from_pretrained`` would have made it."""
    first.floats_first(model)
    if is_ours(model):
        model.hf_quantizer.quantization_config.mode = mode
        return
    quantizer = BitforbitQuantizer(BitforbitConfig(mode=mode), pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    saving.set_config(model, {**model.config, "quantization_config": quantizer.quantization_config})
    saving.attach(model)


def release(model: ModelMixin) -> None:
    """Make a model in which nothing is compressed any more an ordinary one."""
    if is_ours(model):
        saving.detach(model)
        del model.hf_quantizer
        model.is_quantized = False
