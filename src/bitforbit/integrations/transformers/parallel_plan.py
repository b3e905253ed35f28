"""Which ways of splitting a model over processes compressed models have: asked before anything is read."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import MoeExpertsParallel, TensorParallelLayer

from bitforbit.errors import UsageError

_SPLIT = ("colwise", "colwise_gather_output", "colwise_rep", "embedding_colwise", "embedding_rowwise", "grouped_gemm",
          "packed_colwise", "packed_rowwise", "rowwise", "rowwise_rep", "rowwise_split_input")  # fmt: skip
_WHOLE = ("all_reduce", "ep_dispatch_experts", "ep_router", "local_params", "mla_kv_a_proj", "moe_identity_expert",
          "moe_tp_experts", "replicate", "replicated_with_grad_allreduce")  # fmt: skip
_EVEN_ONLY = not hasattr(TensorParallelLayer, "_from_local_last_dim_shard")
"""Whether transformers splits into parts of one size only: before 5.21."""
_SUMS_DTENSORS = "source" in inspect.signature(MoeExpertsParallel.transform_output_post_forward).parameters
"""Whether it sums the outputs of experts only if it finds DTensors in them: before 5.23."""
_PACKED = 2
"""Matrices in one of the packed styles, such as gate and up."""
_KEYS = ("k_proj", "qkv_proj", "query_key_value")
_QUERIES = ("q_proj", "qkv_proj", "query_key_value")


def degree(model: PreTrainedModel) -> int:
    """Number of processes that a model is split over, 1 for an ordinary one.

    Raises UsageError for data and pipeline parallelism, alone or beside others.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None:
        return 1
    for name in ("fsdp_size", "dp_replicate_size", "pp_size"):
        size = getattr(config, name, None) or 1
        if size > 1:
            raise UsageError(
                f"expected a compressed model to be split by tp_size or ep_size, got {name}={size}; for throughput run "
                "one model per process, for layers on several devices pass device_map='auto', for all of it use vLLM"
            )
    return max(config.tp_size or 1, getattr(config, "ep_size", None) or 1)


def check(model: PreTrainedModel, size: int) -> None:
    """Raise UsageError for a style that compressed parameters do not have, or a size that ``size`` does not divide."""
    tensor, experts = _plans(model)
    needs: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        style = _style(name, experts) or _style(name, tensor)
        if parameter.dim() < 2 or style is None:
            continue
        if style not in (*_SPLIT, *_WHOLE):
            raise UsageError(
                f"{name}: expected a parallel style that compressed models have ({', '.join((*_SPLIT, *_WHOLE))}), got "
                f"{style!r}; leave it out of tp_plan, name the module in modules_to_not_convert of a plain checkpoint, "
                "or run the model with vLLM"
            )
        if style in _SPLIT:
            needs |= dict(_needs(model, name, parameter, style))
    common = math.gcd(*needs.values())
    if common % size:
        what, count = next((what, count) for what, count in needs.items() if count % size)
        allowed = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0) or "none"
        raise UsageError(
            f"expected a number of processes that divides {what}, which is {count}, got {size}; this model can be "
            f"split over these numbers: {allowed}"
        )


def unsummed_experts(model: PreTrainedModel) -> Iterator[str]:
    """Modules of experts whose outputs transformers does not sum, as it looks for DTensors in them and finds none."""
    tensor, experts = _plans(model)
    for name, module in model.named_modules():
        style = experts.get(_generic(name), tensor.get(_generic(name)))
        if _SUMS_DTENSORS and style == "moe_tp_experts":
            split = (p for p in module.parameters() if isinstance(p, DTensor))
            if all(placement.is_replicate() for p in split for placement in p.placements):
                yield name


def _plans(model: PreTrainedModel) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The tensor and the expert parallel plan, with what the user gave for them."""
    config = model.config.distributed_config
    tensor: dict[str, str] = {**(model.tp_plan or {})} if (config.tp_size or 1) > 1 else {}
    experts: dict[str, str] = {**(model._ep_plan or {})} if (getattr(config, "ep_size", None) or 1) > 1 else {}
    for plan, given in ((tensor, config.tp_plan), (experts, getattr(config, "ep_plan", None))):
        if isinstance(given, dict):
            plan |= given
    return tensor, experts


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    """The style of a parameter, given by its own name or its module's."""
    generic = _generic(name)
    return plan.get(generic, plan.get(generic.rpartition(".")[0]))


def _generic(name: str) -> str:
    """A name as plans have it: with ``*`` for numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _needs(model: PreTrainedModel, name: str, parameter: torch.Tensor, style: str) -> Iterator[tuple[str, int]]:
    """What must be divisible by the number of processes, with its size."""
    config = model.config.get_text_config()
    owner = name.split(".")[-2] if "." in name else name
    if style == "colwise":
        for names, attribute in ((_QUERIES, "num_attention_heads"), (_KEYS, "num_key_value_heads")):
            heads: Any = getattr(config, attribute, None)
            if owner in names and isinstance(heads, int):
                yield attribute, heads
    dim = _split_dim(model, name, parameter, style)
    if style == "grouped_gemm":
        yield f"the number of experts in {name}", parameter.shape[0]
    elif style.startswith("packed"):
        yield f"half of dimension {dim} of {name}", parameter.shape[dim] // _PACKED
    elif _EVEN_ONLY:
        yield f"dimension {dim} of {name}", parameter.shape[dim]


def _split_dim(model: PreTrainedModel, name: str, parameter: torch.Tensor, style: str) -> int:
    embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    if embedding:
        return 1 if "colwise" in style else 0
    return int(parameter.dim()) - (1 if "rowwise" in style else 2)
