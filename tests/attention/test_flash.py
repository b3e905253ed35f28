"""FlashAttention by tiles against softmax(Q K^T) V, forward and backward, both orders of the loops."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from bitforbit.attention import flash, naive  # noqa: E402
from bitforbit.attention import tiles as tiling  # noqa: E402
from bitforbit.attention.tiles import Order, Tiles  # noqa: E402
from bitforbit.errors import AttentionError  # noqa: E402

ORDERS = ("kv", "q")
SHAPES = [
    # batch, query heads, kv heads, queries, keys, head_dim, value dim, tile of queries, tile of keys
    (1, 1, 1, 1, 1, 4, 4, 1, 1),
    (2, 4, 2, 33, 33, 8, 8, 16, 16),
    (1, 6, 2, 65, 65, 4, 6, 16, 32),
    (1, 2, 1, 7, 63, 8, 8, 4, 16),
    (1, 2, 2, 40, 17, 8, 4, 16, 8),
    (1, 2, 1, 20, 20, 4, 4, 64, 64),
]


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    batch, q_heads, kv_heads, q_tokens, kv_tokens, dim, v_dim, _, _ = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((q_heads, q_tokens, dim), (kv_heads, kv_tokens, dim), (kv_heads, kv_tokens, v_dim))
    made = [torch.randn(batch, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return [x.to(dtype).requires_grad_() for x in made]


def hostile_mask(shape: tuple[int, ...]) -> torch.Tensor:
    """About half of it, whole tiles and whole rows unseen."""
    batch, q_heads, _, q_tokens, kv_tokens, *_ = shape
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(batch, q_heads, q_tokens, kv_tokens, generator=generator) < 0.5
    mask[..., : kv_tokens // 2] &= torch.arange(q_tokens)[:, None] % 3 != 0
    mask[:, :, q_tokens // 2] = False
    return mask


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape: tuple[int, ...], causal: bool, masked: bool, order: Order) -> None:
    mask = hostile_mask(shape) if masked else None
    ours, theirs = tensors(shape), tensors(shape)
    out, lse = flash.attention(*ours, Tiles(*shape[-2:]), order=order, causal=causal, mask=mask)
    expected, expected_lse = naive.attention(*theirs, causal=causal, mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse.detach(), rtol=1e-12, atol=1e-12)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    out.backward(direction)
    expected.backward(direction)
    for got, wanted in zip(ours, theirs, strict=True):
        assert wanted.grad is not None
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order: Order) -> None:
    shape = (1, 2, 1, 5, 7, 3, 2, 2, 3)
    mask = hostile_mask(shape)

    def run(*qkv: torch.Tensor) -> torch.Tensor:
        return flash.attention(*qkv, Tiles(2, 3), order=order, causal=True, mask=mask, scaling=0.7)[0]

    assert torch.autograd.gradcheck(run, tensors(shape))


def test_naive_is_what_torch_computes() -> None:
    q, k, v = tensors((2, 4, 2, 9, 9, 8, 8, 1, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(naive.attention(q, k, v, causal=True)[0], expected)
    bias = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(naive.attention(q, k, v, mask=bias)[0], expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_the_dtype(dtype: torch.dtype, order: Order) -> None:
    q, k, v = tensors((1, 2, 2, 130, 130, 32, 32, 1, 1), dtype)
    exact = naive.attention(q, k, v, causal=True)[0]
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out, _ = flash.attention(q, k, v, Tiles(32, 64), order=order, causal=True)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("order", ORDERS)
def test_scores_far_apart(order: Order) -> None:
    """exp of the scores themselves would overflow; the largest comes last, or first."""
    q, k, v = tensors((1, 1, 1, 16, 48, 4, 4, 8, 8))
    for scale in (torch.linspace(-1000, 1000, 48), torch.linspace(1000, -1000, 48)):
        keys = k.detach() * scale[None, None, :, None].double()
        out, lse = flash.attention(q, keys, v, Tiles(8, 8), order=order)
        expected, expected_lse = naive.attention(q, keys, v)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("order", ORDERS)
def test_layouts_leave_tiles_out(order: Order) -> None:
    shape = (2, 4, 2, 37, 50, 8, 8, 8, 16)
    tiles = Tiles(8, 16)
    layout = torch.rand(2, 4, 5, 4, generator=torch.Generator().manual_seed(4)) < 0.5
    layout[0, 0, 2] = False
    ours, theirs = tensors(shape), tensors(shape)
    record: list[list[tiling.Access]] = []
    out, _ = flash.attention(*ours, tiles, order=order, causal=True, layout=layout, record=record)
    mask = tiling.layout_mask(layout, tiles, 37, 50)
    expected, _ = naive.attention(*theirs, causal=True, mask=mask)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)
    inner = "Q" if order == "kv" else "K"
    head = tiling.Head(37, 50, tiles, 1.0, causal=True, layout=layout[0, 1])
    computed = sum(head.computed(i, j) for i in range(5) for j in range(4))
    assert sum(access.name == inner for access in record[1]) == computed < 20


def test_schedules() -> None:
    head = tiling.Head(4, 6, Tiles(2, 2), 1.0, causal=True)
    assert list(head.pairs("kv")) == [(0, [0, 1]), (1, [0, 1]), (2, [1])]
    assert list(head.pairs("q")) == [(0, [0, 1]), (1, [0, 1, 2])]


def test_words_moved() -> None:
    """Closed forms of what the two orders move, full tiles: 2205.14135, theorem 2; 2307.08691, section 3.1."""
    tokens, dim, tiles = 64, 8, Tiles(8, 16)
    q, k, v = tensors((1, 1, 1, tokens, tokens, dim, dim, 1, 1))
    moved = {}
    for order in ORDERS:
        record: list[list[tiling.Access]] = []
        flash.attention(q, k, v, tiles, order=order, record=record)
        moved[order] = sum(access.words for access in record[0])
    outer = tokens // tiles.kv
    assert moved["kv"] == 2 * tokens * dim + outer * (3 * tokens * dim + 4 * tokens)
    assert moved["q"] == 2 * tokens * dim + tokens + tokens // tiles.q * 2 * tokens * dim


def test_tiles_of_the_paper() -> None:
    assert Tiles.for_memory(1000, 64) == Tiles(4, 4)
    assert Tiles.for_memory(100_000, 64) == Tiles(64, 391)
    with pytest.raises(AttentionError, match="256 words, got 255"):
        Tiles.for_memory(255, 64)


def test_refusals() -> None:
    q, k, v = tensors((1, 3, 2, 4, 4, 4, 4, 1, 1))
    with pytest.raises(AttentionError, match="Hq a multiple of Hkv"):
        flash.attention(q, k, v, Tiles(2, 2))
    with pytest.raises(AttentionError, match="expected 'kv' or 'q'"):
        flash.attention(k, k, v, Tiles(2, 2), order="rows")  # type: ignore[arg-type]
    with pytest.raises(AttentionError, match="expected bool"):
        flash.attention(k, k, v, Tiles(2, 2), mask=torch.zeros(4, 4))
    with pytest.raises(AttentionError, match="at least one row"):
        Tiles(0, 4)


def test_nothing_is_seen() -> None:
    q, k, v = tensors((1, 1, 1, 3, 3, 4, 4, 2, 2))
    mask = torch.zeros(3, 3, dtype=torch.bool)
    for order in ORDERS:
        out, lse = flash.attention(q, k, v, Tiles(2, 2), order=order, mask=mask)
        assert not out.any()
        assert (lse == -math.inf).all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert not any(grad.any() for grad in grads)
