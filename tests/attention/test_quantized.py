"""Attention over quantized caches: error, masks, independence of the other rows, memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitforbit.attention import quantized
from bitforbit.attention.quantized import attend, attend_torch
from bitforbit.errors import KvCacheError
from bitforbit.kv import kernels
from bitforbit.kv.naive import attention
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState
from helpers.kv_paths import emulated, one_thread, path

__all__ = ["emulated", "one_thread", "path"]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPEC = KiviSpec(k_bits=4, v_bits=2, residual=64, sink=3)


def filled(
    spec: KiviSpec, start: list[int], before: int, new: int, heads: int = 2, head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16, alone: int | None = None,
) -> tuple[KvState, torch.Tensor]:  # fmt: skip
    """A cache of tokens that came before, new ones appended, and queries ``[B, 2 H, new, D]``.

    ``alone``: only this row, without its padding.
    """
    random = torch.Generator().manual_seed(before)
    shape = (len(start), heads, before + new, head_dim)
    k, v, q = (torch.randn(shape, generator=random).to(dtype) for _ in range(3))
    q = torch.cat([q, q.flip(1)], 1)[:, :, before:]
    if alone is not None:
        k, v, q = (x[alone : alone + 1] for x in (k, v, q))
        k, v, before, start = k[:, :, start[alone] :], v[:, :, start[alone] :], before - start[alone], [0]
    state = KvState(spec, len(k), heads, head_dim, dtype=dtype, device="cpu")
    if before:
        state.append(k[:, :, :before], v[:, :, :before])
        state.set_padding((torch.arange(before) >= torch.tensor(start)[:, None])[:, None, None])
        state.flush()
    state.append(k[:, :, before:], v[:, :, before:])
    return state, q


def expected(
    state: KvState, q: torch.Tensor, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float64, **extra: Any
) -> torch.Tensor:
    """Attention over the dequantized tokens, computed in a dtype."""
    k, v = (x.to(dtype).repeat_interleave(q.shape[1] // state.heads, 1) for x in state.dequantized())
    settings = {"scaling": q.shape[3] ** -0.5, "softcap": None, "sinks": None} | extra
    out = torch.zeros(q.shape, dtype=dtype)
    for row, start in enumerate(state.starts):
        seen = None if mask is None else mask.expand(len(q), -1, -1, -1)[row, :, :, start:]
        out[row] = attention(q[row].to(dtype), k[row, :, start:], v[row, :, start:], seen, **settings)
    return out


# --- error ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 6, 100])
@pytest.mark.parametrize(
    "spec", [SPEC, KiviSpec(k_bits=8, v_bits=8, v_group=16), KiviSpec(k_bits=2, v_bits=4)], ids=str
)
def test_the_error_is_at_most_twice_that_of_plain_torch(
    spec: KiviSpec, new: int, dtype: torch.dtype, path: str
) -> None:
    state, q = filled(spec, [0], 1200, new, dtype=dtype)
    q = q * 3  # few tokens matter: the hard case for rounding
    truth = expected(state, q)
    k, v = (x.to(dtype) for x in state.dequantized())
    causal = torch.ones(new, 1200 + new, dtype=torch.bool).tril(1200)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    ours = attend(q, state, None, scaling=64**-0.5)
    error, bound = (ours.double() - truth).abs(), (plain.double() - truth).abs()
    assert error.max() <= 2 * bound.max()
    assert error.mean() <= 2 * bound.mean()


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (1, 8), (4, 4), (2, 6)])
def test_heads_of_all_sizes(head_dim: int, heads: tuple[int, int], path: str) -> None:
    state, q = filled(KiviSpec(residual=32, v_group=16), [0, 5], 150, 1, heads[0], head_dim)
    q = q.repeat(1, heads[1], 1, 1)[:, : heads[1]]
    out = attend(q, state, None, scaling=0.1)
    assert (out.double() - expected(state, q, scaling=0.1)).abs().max() < 1.5e-2


# --- masks, softcap, sinks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 7, 70])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3])
def test_masks(kind: str, per_head: bool, new: int, batch: int, path: str) -> None:
    state, q = filled(SPEC, [4, 0, 30], 700, new)
    seen = torch.rand(batch, 4 if per_head else 1, new, 700 + new + 3) < 0.6
    seen[:, :, 0, 40:] = False
    mask = seen
    if kind != "bool":
        mask = torch.where(seen, torch.randn(seen.shape), torch.finfo(torch.float32).min)
        mask = mask if kind == "float" else mask.bfloat16()
    out = attend(q, state, mask, scaling=0.125)
    assert (out.double() - expected(state, q, mask[..., : 700 + new])).abs().max() < 1.5e-2
    strided = mask.mT.contiguous().mT  # slots are not side by side
    assert torch.equal(attend(q, state, strided, scaling=0.125), out)


@pytest.mark.parametrize("new", [1, 3, 80])
def test_softcap_and_sink_logits(new: int, path: str) -> None:
    state, q = filled(SPEC, [0, 9], 300, new)
    for softcap in (None, 2.0):
        for sinks in (None, torch.tensor([-3.0, 0.0, 4.0, 20.0])):
            settings: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "scaling": 0.3}
            out = attend(q, state, None, **settings)
            assert (out.double() - expected(state, q, None, **settings)).abs().max() < 1.5e-2
    assert attend(q, state, None, scaling=0.3, sinks=torch.full((4,), 200.0)).abs().max() < 1e-6


@pytest.mark.parametrize("new", [1, 5, 90])
def test_queries_that_see_nothing_give_zeros(new: int, path: str) -> None:
    state, q = filled(SPEC, [0, 9], 300, new)
    mask = torch.zeros(2, 1, new, 300 + new, dtype=torch.bool)
    mask[0, :, -1] = True
    out = attend(q, state, mask, scaling=0.125)
    assert not out[1].any()
    assert not out[0, :, :-1].any()
    assert out[0, :, -1].any()


@pytest.mark.parametrize("before", [0, 1, 2, 64, 66, 67, 68])
@pytest.mark.parametrize("new", [1, 2])
def test_short_caches_and_empty_rows(before: int, new: int, path: str) -> None:
    state, q = filled(SPEC, [0, before], before, new)
    out = attend(q, state, None, scaling=0.125)
    assert (out.double() - expected(state, q)).abs().max() < 1.5e-2


def test_what_is_stale_is_not_read(path: str) -> None:
    """Padding and what has left the window may hold NaN."""
    state, q = filled(SPEC, [70, 0], 300, 1)
    before = attend(q, state, None, scaling=0.125)
    slots = torch.arange(300 - 64 - 1, 301)
    stale = torch.ones(state.capacity, dtype=torch.bool)
    stale[slots[1:] % state.capacity] = False
    for window in (state.window_k, state.window_v):
        window[:, :, stale] = float("nan")
    assert torch.equal(attend(q, state, None, scaling=0.125), before)


# --- rows by themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 8, 70])
def test_a_row_is_the_same_alone(new: int, dtype: torch.dtype, path: str) -> None:
    """Bytes and bits: whatever the batch, the padding and the number of threads."""
    start = [0, 37, 5]
    state, q = filled(SPEC, start, 1100, new, dtype=dtype)
    together = attend(q, state, None, scaling=0.125)
    if path == "cpu":
        torch.set_num_threads(3)
        assert torch.equal(attend(q, state, None, scaling=0.125), together)
        torch.set_num_threads(1)
    for row in range(3):
        single, query = filled(SPEC, start, 1100, new, dtype=dtype, alone=row)
        assert torch.equal(attend(query, single, None, scaling=0.125), together[row : row + 1])
        for number, segment in enumerate(state.segments):  # the last one may be of the longer rows only
            mine = single.segments[number : number + 1] or [torch.zeros_like(segment[:1])]
            assert torch.equal(mine[0], segment[row : row + 1])


def test_with_cuda_kernels(emulated: Any) -> None:
    """The same in the emulation: GQA, a mask, a chunk."""
    state, q = filled(SPEC, [0, 40], 600, 1)
    mask = torch.rand(2, 1, 1, 601) < 0.7
    out = attend(q, state, mask, scaling=0.125, softcap=3.0, sinks=torch.ones(4))
    settings: dict[str, Any] = {"softcap": 3.0, "sinks": torch.ones(4)}
    assert (out.double() - expected(state, q, mask, **settings)).abs().max() < 1.5e-2
    single, query = filled(SPEC, [0, 40], 600, 1, alone=1)
    assert torch.equal(attend(query, single, None, scaling=0.125), attend(q, state, None, scaling=0.125)[1:])
    state, q = filled(SPEC, [0, 40], 600, 4)
    assert (attend(q, state, None, scaling=0.125).double() - expected(state, q)).abs().max() < 1.5e-2
    assert sum(name == "kv_attend" for name, _ in emulated.launches) == 4


# --- which way, refusals --------------------------------------------------------------------------------------------


def test_kernels_take_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("attend", "attend_before"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _name=name, _kernel=kernel: taken.append(_name) or _kernel(*a))
    for new, way in ((1, ["attend"]), (2, ["attend_before"]), (32, ["attend_before"]), (33, [])):
        state, q = filled(SPEC, [0], 100, new)
        attend(q, state, None, scaling=0.125)
        assert taken == way
        taken.clear()
    state, q = filled(SPEC, [0], 100, 1)
    attend(q, state, torch.zeros(1, 1, 1, 101), scaling=0.125)
    attend(q.float(), state, None, scaling=0.125)
    assert not taken


@pytest.mark.parametrize("new", [1, 40])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_a_cache_without_quantization(new: int, head_dim: int, path: str) -> None:
    state, q = filled(KiviSpec(residual=None), [0, 7], 700, new, head_dim=head_dim, dtype=torch.float32)
    out = attend(q, state, None, scaling=head_dim**-0.5)
    assert (out.double() - expected(state, q)).abs().max() < 5e-6


@pytest.mark.parametrize("new", [1, 3, 80])
def test_neither_gradients_nor_autocast(new: int, path: str) -> None:
    state, q = filled(SPEC, [0], 200, new, dtype=torch.float32)
    plain = attend(q, state, None, scaling=0.125)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q.requires_grad_(), state, None, scaling=0.125)
    assert torch.equal(out, plain)
    assert not out.requires_grad


def test_in_and_out_of_inference_mode(path: str) -> None:
    with torch.inference_mode():
        state, q = filled(SPEC, [2, 0], 200, 1)
        attend(q, state, None, scaling=0.125)
        state.flush()
    for count in (1, 70, 1):
        x = torch.randn(2, 2, count, 64).bfloat16()
        state.append(x, x)
        attend(x, state, None, scaling=0.125)
        state.flush()
        with torch.inference_mode():
            state.reorder(torch.tensor([1, 0]))
            state.crop(state.slots - 1)
    state.crop(20)
    assert state.slots == 20


def test_refusals() -> None:
    state, q = filled(SPEC, [0, 0], 100, 3)
    for wrong in (q[:1], q[:, :3], q[..., :32], q[0]):
        with pytest.raises(KvCacheError, match="expected queries"):
            attend(wrong, state, None, scaling=1.0)
    with pytest.raises(KvCacheError, match=r"as many queries as tokens were appended \(3\), got 2"):
        attend_torch(q[:, :, 1:], state, None, scaling=1.0)
    for mask in (torch.ones(2, 1, 3, 102), torch.ones(2, 3, 3, 103), torch.ones(2, 1, 2, 103), torch.ones(3, 103)):
        with pytest.raises(KvCacheError, match="expected a mask"):
            attend(q, state, mask, scaling=1.0)
    with pytest.raises(KvCacheError, match="4 sink logits"):
        attend(q, state, None, scaling=1.0, sinks=torch.ones(3))
    state.flush()
    with pytest.raises(KvCacheError, match="appended"):
        attend(q, state, None, scaling=1.0)


# --- memory ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operator made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


def test_no_step_makes_a_tensor_of_the_caches_size(path: str) -> None:
    """Neither attention nor what follows it: a segment of a row at most, whatever the length."""
    state, _ = filled(KiviSpec(k_bits=2, v_bits=2, residual=32), [0], 2040, 1)
    packed = sum(segment.nbytes for segment in state.segments)
    record = state.segments[0].nbytes
    state.flush()
    with Largest() as largest:  # 2048 tokens: keys leave, a segment begins
        for _ in range(10):
            x = torch.ones(1, 2, 1, 64, dtype=torch.bfloat16)
            state.append(x, x)
            attend(x, state, None, scaling=0.125)
            state.flush()
    of_a_segment = 2 * 512 * 64 * 8  # all heads; int64 is the widest
    assert largest.nbytes <= (of_a_segment if path == "torch" else record)
    assert sum(segment.nbytes for segment in state.segments) <= packed + record


def test_rows_are_moved_a_segment_at_a_time() -> None:
    state, _ = filled(KiviSpec(k_bits=2, v_bits=2, residual=32), [0, 0], 5100, 1)
    state.flush()
    with Largest() as largest:
        state.reorder(torch.tensor([1, 1]))
        state.crop(5000)
    assert largest.nbytes <= max(state.segments[0].nbytes, state.window_k.nbytes)


DECODE = """
import re, torch
from bitforbit.attention.quantized import attend
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
state = KvState(KiviSpec(k_bits=2, v_bits=2, residual=32), 1, 8, 128, dtype=torch.bfloat16, device="cpu")
x = torch.randn(1, 8, 2048, 128).bfloat16()
for _ in range(8):
    state.append(x, x)
    state.flush()
def steps(count):
    for _ in range(count):
        one = x[:, :, :1]
        state.append(one, one)
        attend(x[:, :, :1].repeat(1, 4, 1, 1), state, None, scaling=0.1)
        state.flush()
steps(2)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
steps(40)
print(peak() - before, sum(s.nbytes for s in state.segments))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoding_needs_no_memory_beside_the_cache() -> None:
    """16 Ki tokens of 8 heads are 64 MiB in BF16, 12 MiB packed: decoding takes less than 8 MiB beside them."""
    try:
        done = subprocess.run([sys.executable, "-c", DECODE], capture_output=True, text=True, check=True, timeout=200)
    except subprocess.CalledProcessError as error:
        if "clear_refs" in error.stderr:
            pytest.skip("the peak of memory cannot be reset here")
        raise AssertionError(error.stderr) from None
    grown, packed = map(int, done.stdout.split())
    assert packed == 33 * 8 * 512 * 128 * 6 // 8
    assert grown < 8 << 20, f"grew by {grown} bytes"


def test_blocks_of_queries_and_keys_change_nothing_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    state, q = filled(SPEC, [0], 300, 90)
    whole = attend(q, state, None, scaling=0.125)
    monkeypatch.setattr("bitforbit.attention.online.BLOCK_QUERIES", 7)
    monkeypatch.setattr("bitforbit.attention.online.BLOCK_KEYS", 11)
    assert (attend(q, state, None, scaling=0.125).float() - whole.float()).abs().max() < 1e-2
    assert quantized.KERNEL_QUERIES == 64
