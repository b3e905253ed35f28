"""Quantized caches on a real GPU: torch's bytes, attention near FP64, the same bits in any company and in graph."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from bitforbit.attention.quantized import attend, attend_torch
from bitforbit.kv import kernels
from bitforbit.kv.quantize import flush_torch
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState
from bitforbit.ops import gpu

DEVICE = torch.device("cuda", 0)
SPECS = [
    (128, KiviSpec(4, 4, 32)),
    (128, KiviSpec(4, 2, 32, sink=5)),
    (128, KiviSpec(2, 2, 128, residual=256)),
    (64, KiviSpec(8, 8, 64, 32)),
    (80, KiviSpec(8, 4, 32, 16)),
    (256, KiviSpec(2, 8, 32, 64)),
]
specs = pytest.mark.parametrize(("head_dim", "spec"), SPECS)
HEADS, QUERY_HEADS = 4, 16
kv_kernels = importlib.import_module("bitforbit.cuda.kv.attend")


def tokens(batch: int, heads: int, count: int, head_dim: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
    random = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn((batch, count, heads, head_dim), generator=random, device=DEVICE)
    return (x + 2 * torch.randn((heads, head_dim), generator=random, device=DEVICE)).to(dtype).transpose(1, 2)


def cache(spec: KiviSpec, k: torch.Tensor, v: torch.Tensor, padding: list[int] | None = None) -> KvState:
    """A cache of all tokens but the last, which is the step's own."""
    state = KvState(spec, len(k), HEADS, k.shape[3], dtype=k.dtype, device=DEVICE)
    count = k.shape[2] - 1
    state.append(k[:, :, :count], v[:, :, :count])
    if padding is not None:
        state.set_padding(seen(padding, count))
    state.flush()
    state.append(k[:, :, count:], v[:, :, count:])
    return state


def seen(padding: list[int], slots: int) -> torch.Tensor:
    starts = torch.tensor(padding, device=DEVICE)
    return (torch.arange(slots, device=DEVICE) >= starts[:, None])[:, None, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@specs
def test_bytes_are_those_of_torch(head_dim, spec, dtype, monkeypatch):
    k, v = (tokens(3, HEADS, 1500, head_dim, seed, dtype) for seed in (1, 2))
    state = cache(spec, k, v, [0, 700, 1499])
    state.flush()
    monkeypatch.setattr(kernels, "can_flush", lambda _: False)
    expected = cache(spec, k, v, [0, 700, 1499])
    flush_torch(expected, expected.flushed, expected.slots)
    assert len(state.segments) == len(expected.segments) > 0
    for ours, theirs in zip(state.segments, expected.segments, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("count", "peak"), [(1, 1), (40, 1), (600, 1), (600, 3), (5000, 1), (5000, 3)])
@specs
def test_attention(head_dim, spec, count, peak):
    k, v = (tokens(2, HEADS, count, head_dim, seed) for seed in (1, 2))
    padding = [0, count // 3]
    state, q = cache(spec, k, v, padding), peak * tokens(2, QUERY_HEADS, 1, head_dim, 3)
    out = attend(q, state, None, scaling=head_dim**-0.5)
    keys, values = (x.repeat_interleave(QUERY_HEADS // HEADS, 1) for x in state.dequantized())
    sdpa = torch.nn.functional.scaled_dot_product_attention
    mask = seen(padding, count)
    exact = sdpa(q.double(), keys.double(), values.double(), attn_mask=mask)
    plain = sdpa(q, keys.bfloat16(), values.bfloat16(), attn_mask=mask)
    error, allowed = ((x.double() - exact).norm() for x in (out, plain))
    assert error <= 2 * allowed


@specs
def test_several_tokens_with_masks_caps_and_sinks(head_dim, spec):
    k, v = (tokens(2, HEADS, 900, head_dim, seed) for seed in (1, 2))
    state, q = cache(spec, k, v), tokens(2, QUERY_HEADS, 1, head_dim, 3)
    mask = torch.rand((2, QUERY_HEADS, 1, 900), device=DEVICE) < 0.5
    sinks = torch.randn(QUERY_HEADS, device=DEVICE)
    settings = {"scaling": 0.1, "softcap": 20.0, "sinks": sinks}
    ours, theirs = (f(q, state, mask, **settings).double() for f in (attend, attend_torch))
    assert (ours - theirs).norm() <= 0.01 * theirs.norm()
    state.flush()
    k, v, q = (tokens(2, heads, 3, head_dim, 4 + heads) for heads in (HEADS, HEADS, QUERY_HEADS))
    state.append(k, v)
    ours, theirs = (f(q, state, None, **settings).double() for f in (attend, attend_torch))
    assert (ours - theirs).norm() <= 0.01 * theirs.norm()


@specs
def test_a_row_has_the_same_bits_in_any_company_and_every_time(head_dim, spec):
    k, v = (tokens(5, HEADS, 3000, head_dim, seed) for seed in (1, 2))
    q = tokens(5, QUERY_HEADS, 1, head_dim, 3)
    padding = [0, 1, 500, 1700, 2990]
    whole = cache(spec, k, v, padding)
    out = attend(q, whole, None, scaling=0.1)
    for _ in range(20):
        assert torch.equal(attend(q, whole, None, scaling=0.1), out)
    for row, start in enumerate(padding):
        alone = cache(spec, k[row : row + 1, :, start:], v[row : row + 1, :, start:])
        assert torch.equal(attend(q[row : row + 1], alone, None, scaling=0.1)[0], out[row])


def test_a_captured_step_is_right_for_every_number_of_slots():
    """With a counter in device memory; the mask-free kernels' own arguments, no Python between replays."""
    head_dim, spec = SPECS[1]
    most = 1600
    k, v = (tokens(1, HEADS, most, head_dim, seed) for seed in (1, 2))
    q, out = tokens(1, QUERY_HEADS, 1, head_dim, 3), torch.empty((1, QUERY_HEADS, 1, head_dim), device=DEVICE)
    state = cache(spec, k[:, :, :1001], v[:, :, :1001])
    state.room_for(most)
    counter = torch.tensor([1000], dtype=torch.int32, device=DEVICE)
    fields = kernels._fields(state, most - 1) | {"counter": counter.data_ptr()}
    call = kernels.cuda_kv.KvCall(**fields, segments=kernels._table(state))
    size = kernels.cuda_kv.workspace_bytes(call, most, QUERY_HEADS // HEADS, 1)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def step() -> None:
        queue = gpu.queue_for(DEVICE)
        strides = (q.stride(0), q.stride(1), q.stride(2))
        kernels.cuda_kv.attend(
            queue, call, most, q.data_ptr(), strides, QUERY_HEADS // HEADS, 1, 0.1, 0.0, 0, 0, (0, 0, 0),
            out.data_ptr(), True, 0, workspace.data_ptr(),
        )  # fmt: skip
        kernels.cuda_kv.flush(queue, call, most, state.watch.count.data_ptr())

    # Compiles; packs a value once more, to the same bytes.
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for slots in range(1000, most):
        place = slots % state.capacity
        state.window_k[:, :, place], state.window_v[:, :, place] = k[:, :, slots], v[:, :, slots]
        counter.fill_(slots)
        graph.replay()
        if slots % 97 == 0 or slots == most - 1:
            expected = cache(spec, k[:, :, : slots + 1], v[:, :, : slots + 1])
            got = attend(q, expected, None, scaling=0.1)
            assert torch.equal(out.bfloat16(), got)


def test_nothing_is_read_that_was_never_written():
    """Rings full of NaN, and a workspace too."""
    head_dim, spec = SPECS[0]
    k, v = (tokens(2, HEADS, 300, head_dim, seed) for seed in (1, 2))
    state, q = cache(spec, k, v, [0, 290]), tokens(2, QUERY_HEADS, 1, head_dim, 3)
    before = attend(q, state, None, scaling=0.1)
    for window in (state.window_k, state.window_v):
        window[1, :, [x % state.capacity for x in range(300 - state.capacity, 290)]] = float("nan")
    assert torch.equal(attend(q, state, None, scaling=0.1), before)


def test_the_blocks_of_a_multiprocessor_do_not_matter(monkeypatch):
    head_dim, spec = SPECS[0]
    k, v = (tokens(2, HEADS, 3000, head_dim, seed) for seed in (1, 2))
    state, q = cache(spec, k, v), tokens(2, QUERY_HEADS, 1, head_dim, 3)
    expected, chosen = attend(q, state, None, scaling=0.1), kv_kernels.kernels

    def four(defines):
        parts, join = chosen(defines)
        return replace(parts, defines=(*parts.defines, ("BITFORBIT_BLOCKS", "4"))), join

    monkeypatch.setattr(kv_kernels, "kernels", four)
    assert torch.equal(attend(q, state, None, scaling=0.1), expected)
