"""Orders of a real GPU's linear: what the probe finds has torch's bits, and it finds what is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.cuda.fused import linear as kernels
from bitforbit.cuda.fused.order import Order
from bitforbit.ops import probe, stats
from bitforbit.ops.gpu import Policy, Product, order_probe, proofs, queues
from helpers.gpu_weights import LAYOUTS
from torch_helpers import assert_same_bits

DEVICE = torch.device("cuda", 0)
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path))
    proofs.clear()
    stats.reset()
    yield
    torch.cuda.synchronize()
    proofs.clear()
    ops.gpu.clear()


def plain_in(order: Order) -> probe.Linear:
    """A linear of a known order: that of our own kernel for plain weights."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty(len(flat), len(weight), dtype=torch.bfloat16, device=DEVICE)
        kernels.plain(
            queues.queue_for(DEVICE), weight.data_ptr(), len(weight), order, 0 if bias is None else bias.data_ptr(),
            flat.data_ptr(), len(flat), out.data_ptr(),
        )  # fmt: skip
        return out.view(*x.shape[:-1], len(weight))

    return linear


@pytest.mark.parametrize(
    "order",
    [
        Order(1000, 1), Order(1000, 4), Order(1000, 3, 6), Order(1000, 5, reduction="halves"),
        Order(1000, 8, reduction="descending", partials="BF16"), Order(1000, 4, partials="running BF16"),
    ],
    ids=lambda o: f"{o.splits}-{o.split_tiles}-{o.rules:b}",
)  # fmt: skip
def test_known_orders_are_found(order: Order) -> None:
    for tokens in (1, 9):
        found = order_probe.find_order(plain_in(order), DEVICE, Product(300, 1000, tokens, 2, 256, 256))
        assert found is not None
        assert found.ranges == order.ranges
        assert (found.reduction, found.partials) == (order.reduction, order.partials)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_what_is_found_for_torch_holds(rows: int, cols: int, tokens: int) -> None:
    """On inputs that the probe has not seen, in graphs and outside of them; where nothing is found, by decoding."""
    generator = torch.Generator(DEVICE).manual_seed(rows + tokens)
    weight = (torch.randn((rows, cols), generator=generator, device=DEVICE) * 0.02).bfloat16()
    case = LAYOUTS["tiles"](weight)
    found = ops.gpu.prove([Product(rows, cols, tokens, 2, 256, 0)], DEVICE)
    print(f"{rows} x {cols}, {tokens} tokens: {next(iter(found.values()))}")
    with ops.gpu.use_policy(Policy(prove_after=None)):
        for _ in range(20):
            x = torch.randn((tokens, cols), generator=generator, device=DEVICE).bfloat16()
            assert_same_bits(case.linear(x, None, "exact"), functional.linear(x, weight))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.linear(x, None, "exact")
        graph.replay()
        assert_same_bits(captured, functional.linear(x, weight))
    proven = next(iter(found.values())) is not None
    assert stats.snapshot()["fused_exact" if proven else "decoded"].linears == 21
