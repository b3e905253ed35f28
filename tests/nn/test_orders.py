"""Proofs for all linears of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bitforbit import ops
from bitforbit.cuda.fused.order import Order
from bitforbit.errors import UsageError
from bitforbit.nn import compress_model, prove_orders, set_layout
from bitforbit.ops import stats
from bitforbit.ops.gpu import Policy, Product, order_probe, proofs
from cuda_shim.emulation import EmulatedQueue
from helpers.order_cases import linear_in


def model_in_tiles() -> nn.Module:
    model = nn.Sequential(nn.Linear(128, 160), nn.SiLU(), nn.Linear(160, 128, bias=False), nn.Linear(128, 160))
    model = model.bfloat16().requires_grad_(False)
    compress_model(model)
    set_layout(model, "tiles")
    return model


def test_every_linear_is_proven_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path))
    order = Order(128, 2)
    asked: list[Product] = []

    def find_order(linear: object, device: torch.device, product: Product) -> Order | None:
        asked.append(product)
        return order if product.cols == 128 else None

    monkeypatch.setattr(order_probe, "find_order", find_order)
    proofs.clear()
    stats.reset()
    with ops.gpu.emulate(EmulatedQueue()):
        model = model_in_tiles()
        with proofs.examine(linear_in(order)), ops.gpu.use_policy(Policy(prove_after=None)):
            found = prove_orders(model, tokens=(1, 3, 99))
            x = order_probe._placed(torch.randn(1, 3, 128).bfloat16())
            model(x)
    proofs.clear()
    assert len(asked) == len(set(asked)) == len(found) - sum(p.tokens == 99 for p in found)
    assert {(p.rows, p.cols, p.tokens, p.dims) for p in asked} == {
        (rows, cols, tokens, dims) for rows, cols in ((160, 128), (128, 160)) for tokens in (1, 3) for dims in (2, 3)
    }
    assert {p.bias_alignment > 0 for p in asked if p.cols == 128} == {True}
    assert {product for product, proven in found.items() if proven} == {p for p in asked if p.cols == 128}
    assert stats.snapshot()["fused_exact"].linears >= 1


def test_models_without_tiles() -> None:
    assert prove_orders(nn.Linear(64, 64)) == {}
    with ops.gpu.emulate(EmulatedQueue()):
        model = model_in_tiles()
    with pytest.raises(UsageError, match="CUDA device"):
        prove_orders(model)
