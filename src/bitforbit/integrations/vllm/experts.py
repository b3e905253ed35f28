"""Experts of vLLM's mixture layers, compressed in the order in which its kernels want them.

vLLM packs the two weights, ``w13_weight`` and ``w2_weight`` ``[experts, ...]``, for the kernel that it has chosen. What
is compressed is the result, so that a forward pass decodes and does not pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.lora.utils import is_in_target_modules
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from bitforbit.errors import UsageError
from bitforbit.integrations.vllm import parameter
from bitforbit.nn.spec import CompressedSpec

_NAMES = ("w13_weight", "w2_weight")


class BitforbitExpertsMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for plain experts; the weights exist in plain form only while a layer runs."""

    uses_meta_device = True

    def __init__(self, moe: Any, prefix: str) -> None:
        """Raises UsageError if vLLM is to do with the experts what needs them plain."""
        _check_plain_is_not_needed(moe, prefix)
        super().__init__(moe)
        self.prefix = prefix

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """See vLLM."""
        parameter.create_on_meta(super().create_weights, layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the weights as vLLM does, then compress them. Raises MissingTensorError."""
        if not parameter.is_new(layer, self.prefix):
            return
        if current_platform.is_cpu():
            # With a kernel made already, vLLM would not pack weights that are loaded anew.
            self.moe_kernel = None
        super().process_weights_after_loading(layer)
        for name in _NAMES:
            parameter.compress(layer, name)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: Any, topk_ids: Any, *args: Any,
              **kwargs: Any) -> torch.Tensor:  # fmt: skip
        """See vLLM."""
        with _decoded(layer, topk_ids):
            out: torch.Tensor = super().apply(layer, x, topk_weights, topk_ids, *args, **kwargs)
        return out

    def apply_monolithic(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """See vLLM."""
        with _decoded(layer, None):
            return super().apply_monolithic(layer, *args, **kwargs)


def _check_plain_is_not_needed(moe: Any, prefix: str) -> None:
    remedy = "keep the experts plain (modules_to_not_convert: experts in quantization_config)"
    if moe.moe_parallel_config.enable_eplb:
        raise UsageError(
            f"{prefix}: expected enable_eplb to be off, since experts that move between processes must be plain; "
            f"leave it off, or {remedy}"
        )
    config = get_current_vllm_config_or_none()
    adapters = None if config is None else config.lora_config
    if adapters is not None and is_in_target_modules(prefix, adapters.target_modules):
        raise UsageError(
            f"{prefix}: expected no adapters for compressed experts, whose weights their kernels read plain; name "
            f"other layers with --lora-target-modules, or {remedy}"
        )


@contextmanager
def _decoded(layer: torch.nn.Module, ids: torch.Tensor | None) -> Iterator[None]:
    """Give the layer plain weights; only those of the experts ``ids`` need be valid, None: all."""
    plain = []
    for name in _NAMES:
        spec = parameter.spec_of(layer, name)
        if spec is not None:
            layer.__dict__[name] = _weight(layer, spec, name, ids)
            plain.append(name)
    try:
        yield
    finally:
        for name in plain:
            del layer.__dict__[name]


def _weight(layer: torch.nn.Module, spec: CompressedSpec, name: str, ids: torch.Tensor | None) -> torch.Tensor:
    # A GPU would have to wait for the ids, which a graph cannot.
    if ids is None or not ids.is_cpu or layer.expert_map is not None:
        return parameter.decode(layer, spec, name)
    parts, (rows, cols) = parameter.parts_of(layer, spec, name), spec.matrix_shape()
    weight = torch.empty((rows, cols), dtype=spec.dtype)
    height = rows // spec.shape[0]
    for expert in ids.unique().tolist():
        spec.decode_into(weight[expert * height : (expert + 1) * height], parts, expert * height)
    return weight.view(spec.shape)
