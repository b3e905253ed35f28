"""Products with a compressed weight, as vLLM computes them with a plain one, or straight from the compressed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor, nn
from torch.nn import functional
from vllm.forward_context import get_forward_context
from vllm.model_executor.determinism.batch_invariant import linear_batch_invariant
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm, dispatch_unquantized_gemm
from vllm.platforms import current_platform

from bitforbit import ops
from bitforbit.integrations.vllm.parameter import decode, parts_of, spec_of
from bitforbit.nn.gpu_specs import TilesSpec
from bitforbit.nn.spec import PlanesSpec


def linear(layer: nn.Module, x: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    """``x @ weight.T + bias`` for a layer with a compressed ``weight``: x ``[..., cols]`` -> ``[..., rows]``."""
    spec = spec_of(layer)
    assert spec is not None
    parts = parts_of(layer, spec)
    product: Tensor
    if isinstance(spec, PlanesSpec) and current_platform.is_cpu():
        if mode == "fused" and spec.kind == "BF16":
            product = ops.linear(x, *parts, bias, *spec.arguments, mode)
            return product
        dispatch = not getattr(layer, "_cpu_skip_gemm_dispatch", False)
        product = torch.ops.bitforbit_vllm.cpu_linear(x, list(parts), bias, *spec.arguments, dispatch)
        return product
    if mode == "fused" and isinstance(spec, TilesSpec):
        product = ops.tiles_linear(x, *parts, bias, spec.rows, spec.cols, mode, [], spec.kind)
        return product
    weight = decode(layer, spec)
    if envs.VLLM_BATCH_INVARIANT:
        return linear_batch_invariant(x, weight, bias)
    return dispatch_unquantized_gemm()(layer, x, weight, bias)


def cpu_linear(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype, dispatch: bool,
) -> Tensor:  # fmt: skip
    """A product on a CPU with vLLM's own kernel, whose choice and packing depend on the weight's shape.

    The weight is decoded and packed for each call. ``dispatch``: false for layers of which vLLM wants torch's product.
    """
    code, digits, sign_mantissa, tails = parts
    weight = ops.decode(code, digits, sign_mantissa, tails, kind, rows, cols, rows_per_table, dtype, 0, rows)
    if not dispatch:
        return functional.linear(x, weight, bias)
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        # Packing may change its dtype, so it must be the layer's own.
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    result: Tensor = layer.cpu_linear(x, layer.weight, None if bias is None else layer.bias)
    return result


def named_linear(x: Tensor, bias: Tensor | None, layer: str, rows: int) -> Tensor:
    """What the layer of this name in vLLM's forward context makes of x: ``[..., rows]``."""
    module = get_forward_context().no_compile_layers[layer]
    result: Tensor = module.quant_method.apply(module, x, bias)
    return result


def named_embedding(ids: Tensor, layer: str, cols: int, dtype: torch.dtype) -> Tensor:
    """Rows of the layer of this name by number, ``[*ids.shape, cols]``."""
    module = get_forward_context().no_compile_layers[layer]
    result: Tensor = module.quant_method.embedding(module, ids)
    return result


def _fake_named_linear(x: Tensor, bias: Tensor | None, layer: str, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _fake_named_embedding(ids: Tensor, layer: str, cols: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, cols), dtype=dtype)


def _fake_cpu_linear(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None,
    kind: str, rows: int, cols: int, rows_per_table: int, dtype: torch.dtype, dispatch: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], rows))


_LIBRARY = torch.library.Library("bitforbit_vllm", "DEF")
# Which kernel torch picks depends on the strides of its input: compilers must leave them alone.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY.define(
    "cpu_linear(Tensor x, Tensor[] parts, Tensor? bias, str kind, int rows, int cols, int rows_per_table, "
    "ScalarType dtype, bool dispatch) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.impl("cpu_linear", cpu_linear, "CPU")
torch.library.register_fake("bitforbit_vllm::cpu_linear", _fake_cpu_linear, lib=_LIBRARY)
_LIBRARY.define("linear(Tensor x, Tensor? bias, str layer, int rows) -> Tensor", tags=_TAGS)
_LIBRARY.impl("linear", named_linear, "CompositeExplicitAutograd")
torch.library.register_fake("bitforbit_vllm::linear", _fake_named_linear, lib=_LIBRARY)
_LIBRARY.define("embedding(Tensor ids, str layer, int cols, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIBRARY.impl("embedding", named_embedding, "CompositeExplicitAutograd")
torch.library.register_fake("bitforbit_vllm::embedding", _fake_named_embedding, lib=_LIBRARY)
