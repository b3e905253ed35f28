"""``model.resize_token_embeddings`` of compressed models: for new tokens, which adapters are often trained with."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitforbit.errors import UsageError
from bitforbit.nn import compress_model, compressed_parameters, decompress_model


def resize_token_embeddings(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """As the class's, which writes to the weights: these are plain meanwhile, and compressed again afterwards.

    Raises UsageError for a model that is split over processes.
    """
    if model.hf_quantizer.sharding is not None:
        raise UsageError(
            "expected a whole model to resize the embeddings of, got one that is split over processes; resize it in "
            "one process, save it, and load that"
        )
    before = _ends(model)
    compressed = [role for role, module in before.items() if compressed_parameters(module)]
    decompress_model(nn.ModuleList(before.values()))
    model.hf_quantizer.ties.rewrite(model)
    try:
        return type(model).resize_token_embeddings(model, *args, **kwargs)
    finally:
        ends = _ends(model)
        again = nn.ModuleList(ends[role] for role in compressed if role in ends)
        compress_model(again, model.hf_quantizer.quantization_config.mode)
        model.hf_quantizer.ties.rewrite(model)


def _ends(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embedding and the head, by role, as far as the model has them."""
    ends = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    return {role: module for role, module in ends.items() if isinstance(module, nn.Module)}
