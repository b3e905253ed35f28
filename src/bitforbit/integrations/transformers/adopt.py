"""Models of transformers that were compressed after loading."""

from __future__ import annotations

from transformers import PreTrainedModel

from bitforbit.integrations.transformers.config import BitforbitConfig
from bitforbit.integrations.transformers.quantizer import BitforbitQuantizer
from bitforbit.integrations.transformers.saving import attach
from bitforbit.integrations.transformers.ties import Ties


def ties_of(model: PreTrainedModel) -> Ties | None:
    """The model's ties, to be read before it is compressed; None if it is one of ours already."""
    return None if is_ours(model) else Ties(model)


def is_ours(model: PreTrainedModel) -> bool:
    """Whether the model was loaded, or adopted, as a compressed one."""
    return isinstance(getattr(model, "hf_quantizer", None), BitforbitQuantizer)


def adopt(model: PreTrainedModel, ties: Ties | None, mode: str) -> None:
    """Make a model in which parameters have been compressed what ``from_pretrained`` would have made it."""
    if ties is None:
        model.hf_quantizer.ties.rewrite(model)
        model.config.quantization_config.mode = mode
        return
    quantizer = BitforbitQuantizer(BitforbitConfig(mode=mode), pre_quantized=True)
    quantizer.ties = ties
    ties.rewrite(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config
    attach(model)


def release(model: PreTrainedModel) -> None:
    """Make a model in which nothing is compressed any more an ordinary one."""
    if is_ours(model):
        model.hf_quantizer.forget(model)
        model.hf_quantizer.remove_quantization_config(model)
