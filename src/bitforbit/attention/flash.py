"""FlashAttention in plain loops: attention by tiles, never holding the matrix of scores.

Two orders of the loops: "kv" outside, as FlashAttention has it (arXiv 2205.14135, algorithms 1 and 4), or "q" outside,
as FlashAttention-2 has it (arXiv 2307.08691, algorithms 1 and 2). Slow memory holds whole matrices; fast memory holds
the tiles that the loops name. Every move between the two goes through ``tiles.Memory``, which keeps a record: what the
loops do is what is counted. Written to be read; the production paths are torch's own kernels.

Block-sparse attention (2205.14135, section 3.3, algorithm 5) is the same loops: tiles that the layout leaves out are
neither read nor multiplied. Causal masks leave out the tiles above the diagonal in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bitforbit.attention import shapes
from bitforbit.attention.tiles import Access, Head, Memory, Order, Tiles
from bitforbit.errors import AttentionError


def forward(head: Head, memory: Memory, order: Order) -> None:
    """From "Q", "K" and "V" to "O" ``[q_tokens, Dv]`` and "L" ``[q_tokens]``, the log-sum-exp of the scores."""
    if order == "kv":
        _forward_kv_outside(head, memory)
    else:
        _forward_q_outside(head, memory)


def _forward_kv_outside(head: Head, memory: Memory) -> None:
    """2205.14135, algorithm 1: outputs, maxima and sums go to slow memory and back for each tile of keys.

    O is kept divided by its sum. The backward pass needs m + log(l) only, which takes the place of m and l at the end
    of the last step: here they are one more row of words each until then, as in the paper.
    """
    matrices = memory.matrices
    matrices |= {name: torch.empty_like(matrices["L"]) for name in ("m", "l")}
    memory.rows |= {"m": head.tiles.q, "l": head.tiles.q}
    for i in range(head.q_tiles):
        for name, value in (("O", 0.0), ("m", -math.inf), ("l", 0.0)):
            memory.write(name, i, torch.full_like(memory.tile(name, i), value))
    for j, inner in head.pairs("kv"):
        if not inner:
            continue
        k, v = memory.read("K", j), memory.read("V", j)
        for i in inner:
            q, o = memory.read("Q", i), memory.read("O", i)
            m, l = memory.read("m", i), memory.read("l", i)  # noqa: E741  (the paper's name)
            scores = head.scores(q, k, i, j)
            m_new = torch.maximum(m, scores.amax(-1))
            p = torch.exp(scores - _finite(m_new)[:, None])
            old = l * torch.exp(m - _finite(m_new))  # the sum so far, of the new scale
            l_new = old + p.sum(-1)
            memory.write("O", i, (old[:, None] * o + p @ v) / _positive(l_new)[:, None])
            memory.write("m", i, m_new)
            memory.write("l", i, l_new)
    matrices["L"].copy_(matrices.pop("m") + torch.log(matrices.pop("l")))


def _forward_q_outside(head: Head, memory: Memory) -> None:
    """2307.08691, algorithm 1: a tile of outputs stays in fast memory until it is complete, and is divided once."""
    for i, inner in head.pairs("q"):
        q = memory.read("Q", i)
        o = q.new_zeros(q.shape[0], memory.matrices["V"].shape[1])
        m = q.new_full(q.shape[:1], -math.inf)
        l = q.new_zeros(q.shape[0])  # noqa: E741  (the paper's name)
        for j in inner:
            k, v = memory.read("K", j), memory.read("V", j)
            scores = head.scores(q, k, i, j)
            m_new = torch.maximum(m, scores.amax(-1))
            p = torch.exp(scores - _finite(m_new)[:, None])
            rescale = torch.exp(m - _finite(m_new))
            l = rescale * l + p.sum(-1)  # noqa: E741
            o = rescale[:, None] * o + p @ v
            m = m_new
        memory.write("O", i, o / _positive(l)[:, None])
        memory.write("L", i, m + torch.log(l))


def backward(head: Head, memory: Memory, order: Order) -> None:
    """From "Q", "K", "V", "O", "L" and "dO" to "dQ", "dK" and "dV". The scores are computed again from L."""
    # 2307.08691, algorithm 2, line 4: the same number as sum(P * dP) of 2205.14135, section 3.1, without P.
    memory.matrices["D"] = (memory.matrices["dO"] * memory.matrices["O"]).sum(-1)
    memory.rows["D"] = head.tiles.q
    for name in ("dQ", "dK", "dV"):
        memory.matrices[name].zero_()
    if order == "kv":
        for j, inner in head.pairs("kv"):
            if not inner:
                continue
            k, v = memory.read("K", j), memory.read("V", j)
            dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            for i in inner:
                q = memory.read("Q", i)
                p, ds, do = _score_gradients(head, memory, q, k, v, i, j)
                dv += p.T @ do
                memory.write("dQ", i, memory.read("dQ", i) + head.scaling * ds @ k)
                dk += head.scaling * ds.T @ q
            memory.write("dK", j, dk)
            memory.write("dV", j, dv)
        return
    for i, inner in head.pairs("q"):
        if not inner:
            continue
        q = memory.read("Q", i)
        dq = torch.zeros_like(q)
        for j in inner:
            k, v = memory.read("K", j), memory.read("V", j)
            p, ds, do = _score_gradients(head, memory, q, k, v, i, j)
            dq += head.scaling * ds @ k
            memory.write("dV", j, memory.read("dV", j) + p.T @ do)
            memory.write("dK", j, memory.read("dK", j) + head.scaling * ds.T @ q)
        memory.write("dQ", i, dq)


def _score_gradients(
    head: Head, memory: Memory, q: Tensor, k: Tensor, v: Tensor, i: int, j: int
) -> tuple[Tensor, Tensor, Tensor]:
    """P and dS of a pair of tiles, and dO of its queries."""
    do, lse, d = memory.read("dO", i), memory.read("L", i), memory.read("D", i)
    p = torch.exp(head.scores(q, k, i, j) - _finite(lse)[:, None])
    return p, p * (do @ v.T - d[:, None]), do


def _finite(maximum: Tensor) -> Tensor:
    """Zero in place of -inf: nothing has been seen, and -inf - (-inf) would be NaN."""
    return torch.where(maximum == -math.inf, torch.zeros_like(maximum), maximum)


def _positive(total: Tensor) -> Tensor:
    """One in place of zero: a query that sees nothing has an output of zeros."""
    return torch.where(total == 0, torch.ones_like(total), total)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    *,
    order: Order = "q",
    causal: bool = False,
    mask: Tensor | None = None,
    layout: Tensor | None = None,
    scaling: float | None = None,
    record: list[list[Access]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by tiles, with a backward pass by tiles: outputs ``[B, Hq, Lq, Dv]`` and log-sum-exp ``[B, Hq, Lq]``.

    Arguments as those of :func:`bitforbit.attention.naive.attention`, ``mask`` being bool, and ``layout`` bool,
    broadcast to ``[B, Hq, q tiles, kv tiles]``: tiles left out are not seen. Sums are kept in FP32 for half precision,
    else in the dtype of ``q``. ``record`` gets the accesses of each head's forward pass, in order. No gradient flows
    through the log-sum-exp. Raises AttentionError for shapes that do not fit.
    """
    if order not in ("kv", "q"):
        raise AttentionError(f"order: expected 'kv' or 'q' (the outer loop), got {order!r}")
    shapes.check(q, k, v)
    if mask is not None and mask.dtype != torch.bool:
        raise AttentionError(f"mask: expected bool, got {mask.dtype}; naive.attention takes masks that are added")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    settings = (tiles, order, causal, mask, layout, scale, record)
    out, lse = _Attention.apply(q, k, v, settings)
    return out, lse


class _Attention(torch.autograd.Function):
    """All heads, one after the other."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        tiles, order, causal, mask, layout, scaling, record = settings
        ctx.settings = settings
        sums = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=sums)
        lse = q.new_full(q.shape[:3], -math.inf, dtype=sums)
        for b, h, head in _heads(q, k, tiles, causal, mask, layout, scaling):
            kv_head = h // (q.shape[1] // k.shape[1])
            memory = _memory(tiles, Q=q[b, h], K=k[b, kv_head], V=v[b, kv_head])
            memory.matrices |= {"O": out[b, h], "L": lse[b, h]}
            forward(head, memory, order)
            if record is not None:
                record.append(memory.record)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        del grad_lse
        q, k, v, out, lse = ctx.saved_tensors
        tiles, order, causal, mask, layout, scaling, _ = ctx.settings
        dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
        for b, h, head in _heads(q, k, tiles, causal, mask, layout, scaling):
            kv_head = h // (q.shape[1] // k.shape[1])
            memory = _memory(tiles, Q=q[b, h], K=k[b, kv_head], V=v[b, kv_head], dO=grad_out[b, h])
            memory.matrices |= {"O": out[b, h], "L": lse[b, h]}
            memory.matrices |= {f"d{name}": torch.empty_like(memory.matrices[name]) for name in "QKV"}
            backward(head, memory, order)
            dq[b, h] = memory.matrices["dQ"]
            dk[b, kv_head] += memory.matrices["dK"]  # of all queries that share the head
            dv[b, kv_head] += memory.matrices["dV"]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _heads(
    q: Tensor, k: Tensor, tiles: Tiles, causal: bool, mask: Tensor | None, layout: Tensor | None, scaling: float
) -> Iterator[tuple[int, int, Head]]:
    batch, heads, q_tokens, _ = q.shape
    plain = Head(q_tokens, k.shape[2], tiles, scaling, causal)
    seen = None if mask is None else mask.expand(batch, heads, q_tokens, k.shape[2])
    kept = None if layout is None else layout.expand(batch, heads, plain.q_tiles, plain.kv_tiles)
    for b in range(batch):
        for h in range(heads):
            own = None if seen is None else seen[b, h]
            tiled = None if kept is None else kept[b, h]
            yield b, h, Head(q_tokens, k.shape[2], tiles, scaling, causal, own, tiled)


def _memory(tiles: Tiles, **matrices: Tensor) -> Memory:
    rows = dict.fromkeys(("Q", "O", "L", "dO", "dQ"), tiles.q) | dict.fromkeys(("K", "V", "dK", "dV"), tiles.kv)
    return Memory(rows, {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in matrices.items()})
