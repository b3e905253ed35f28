"""The quantizer's formulas on hostile numbers: what they promise, and the same bits from all who know them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitforbit.errors import KvCacheError, NonFiniteKeysError
from bitforbit.kv import kernels, pack
from bitforbit.kv.layout import KvLayout, key_position, value_position
from bitforbit.kv.naive import dequantize, params_dtype, quantize_groups, round_down, round_up
from bitforbit.kv.quantize import Watch
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState
from cuda_shim.emulation import EmulatedLauncher
from helpers import kv_cases
from helpers.bits import assert_bitwise_equal

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def hostile_groups(dtype: torch.dtype) -> torch.Tensor:
    """``[n, 32]``: constants, zeros of both signs, subnormals, the largest numbers, random bits, without NaN."""
    big = torch.finfo(dtype).max
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least subnormal
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 32, generator=random)
    bits = torch.randint(0, 256, (400, 32 * dtype.itemsize), generator=random, dtype=torch.uint8).view(dtype)
    rows = [
        *(torch.full((32,), x) for x in (0.0, -0.0, 1.0, -3.0, big, -big, least, -least)),
        torch.tensor([0.0, -0.0] * 16),
        torch.tensor([big, -big] * 16),
        torch.tensor([big, -big] + [0.0, 1.0, big / 2] * 10),
        torch.tensor([least, -least] * 16),
        torch.tensor([0.0, least] * 16),
        torch.tensor([1.0, 1.0 + torch.finfo(dtype).eps] * 16),
        torch.linspace(-1, 1, 32),
    ]
    x = torch.cat([torch.stack(rows), noise, noise * 1e-3 + 100, noise * least * 50, noise.exp()]).to(dtype)
    finite = torch.where(bits.isfinite(), bits, 0)
    return torch.cat([x, finite, finite[:, :1].expand(-1, 32)])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_in_numpy(dtype: torch.dtype, bits: int) -> None:
    x = hostile_groups(dtype)
    x = torch.cat([x, x[:3]])
    x[-1, 5], x[-2, 0], x[-3, 31] = float("nan"), float("inf"), float("-inf")
    codes, scale, zero = quantize_groups(x, bits, params_dtype(dtype))
    expected = kv_cases.quantize(x.float().numpy(), bits, NAMES[dtype])
    assert np.array_equal(scale.view(torch.int16).numpy().view(np.uint16), expected[1])
    assert np.array_equal(zero.view(torch.int16).numpy().view(np.uint16), expected[2])
    assert np.array_equal(codes.numpy(), expected[0])
    assert scale[-3:].isnan().all()
    assert zero[-3:].isnan().all()
    assert not codes[-3:].any()


def test_float32_beyond_bfloat16() -> None:
    """Scale and zero stay finite where bfloat16 ends before float32 does."""
    most = torch.finfo(torch.float32).max
    x = torch.tensor([[-most] * 4, [most] * 4, [-most, most] * 2, [-most, -most, -most, 0.0]])
    codes, scale, zero = quantize_groups(x, 4, torch.bfloat16)
    assert scale.isfinite().all()
    assert zero.isfinite().all()
    assert codes.tolist() == [[0] * 4, [15] * 4, [0, 15] * 2, [0, 0, 0, 15]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_within_half_a_step(dtype: torch.dtype, bits: int) -> None:
    x = hostile_groups(dtype)
    x = x[x.float().abs().amax(-1) < 1e38]  # beyond, differences overflow
    codes, scale, zero = quantize_groups(x, bits, params_dtype(dtype))
    back = dequantize(codes, scale[:, None], zero[:, None])
    assert back.isfinite().all()
    error, step = (back.double() - x.double()).abs(), scale.double()[:, None]
    rounding = 2.0**-22 * (x.double().abs().amax(-1, keepdim=True) + step * 2**bits)
    assert (error <= step * 0.5 + rounding).all()
    constant = (x == x[:, :1]).all(-1)
    if dtype is not torch.float32:
        assert torch.equal(back[constant], x[constant].float() + 0.0)
    assert (zero.float() <= x.float().amin(-1)).all()


@pytest.mark.parametrize("params", [torch.bfloat16, torch.float16])
def test_directed_rounding(params: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(params).float()
    every = every[every.isfinite()]
    assert torch.equal(round_down(every, params).float(), every)
    assert torch.equal(round_up(every[every >= 0], params).float(), every[every >= 0])
    ordered = every.sort().values
    low, high = ordered[:-1], ordered[1:]
    between = ((low.double() + high.double()) / 2).float()
    inside = (between > low) & (between < high)
    low, between, high = low[inside], between[inside], high[inside]
    assert torch.equal(round_down(between, params).float(), low)
    assert torch.equal(round_up(between[low >= 0], params).float(), high[low >= 0])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_packing_is_what_the_layout_says(kind: str, head_dim: int, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 64, head_dim), dtype=torch.uint8)
    packed = pack.pack_codes(kind, codes, bits)
    words = packed.view(2, 2, -1).contiguous().view(torch.int32).numpy().view(np.uint32)
    for token in range(32):
        for channel in range(head_dim):
            word, shift = (
                key_position(bits, token, channel) if kind == "key" else value_position(bits, head_dim, token, channel)
            )
            assert (words[1, 1, word] >> shift) & (2**bits - 1) == codes[1, 32 + token, channel]
    assert torch.equal(pack.unpack_codes(kind, packed, bits, head_dim), codes)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_parts_of_records(group: int) -> None:
    """Written in pieces or at once, read in any range."""
    layout = KvLayout(KiviSpec(k_bits=4, v_bits=2, group=group, residual=group, v_group=16), 48)
    x = torch.randn(3, 512, 48).bfloat16()
    once, pieces = (torch.zeros(3, layout.record_bytes, dtype=torch.uint8) for _ in range(2))
    pack.write_keys(once, layout, 0, x, torch.bfloat16)
    pack.write_values(once, layout, 0, x, torch.bfloat16)
    for first in range(0, 512, group):
        pack.write_keys(pieces, layout, first, x[:, first : first + group], torch.bfloat16)
    for first, last in ((0, 1), (1, 32), (32, 33), (33, 100), (100, 512)):
        pack.write_values(pieces, layout, first, x[:, first:last], torch.bfloat16)
    assert torch.equal(once, pieces)
    for read in (pack.read_keys, pack.read_values):
        whole = read(once, layout, 0, 512, torch.bfloat16)
        assert (whole - x.float()).abs().max() < 2
        for first, last in ((0, 1), (5, 6), (31, 33), (100, 300), (511, 512), (7, 7)):
            assert torch.equal(read(once, layout, first, last, torch.bfloat16), whole[:, first:last])
    pack.clear_values(once, layout, 77)
    pack.clear_keys(once, layout, 256)
    assert not pack.read_values(once, layout, 77, 512, torch.bfloat16).any()
    assert not pack.read_keys(once, layout, 256, 512, torch.bfloat16).any()
    assert pack.read_values(once, layout, 76, 77, torch.bfloat16).any()


def packed(dtype: torch.dtype, bits: int) -> list[torch.Tensor]:
    """Segments with every group of :func:`hostile_groups` as keys of a channel and as values of a token."""
    groups = hostile_groups(dtype)
    groups = groups[: len(groups) // 32 * 32]
    keys = groups.unflatten(0, (-1, 32)).mT.flatten(0, 1)
    state = KvState(KiviSpec(k_bits=bits, v_bits=bits, residual=32), 1, 1, 32, dtype=dtype, device="cpu")
    state.append(torch.cat([keys, keys[:32]])[None, None], torch.cat([groups, groups[:32]])[None, None])
    state.flush()
    return state.segments


def packed_by_torch(dtype: torch.dtype, bits: int) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "can_flush", lambda *_: False)
        return packed(dtype, bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_kernels_write_the_same_bytes(dtype: torch.dtype, bits: int) -> None:
    for got, expected in zip(packed(dtype, bits), packed_by_torch(dtype, bits), strict=True):
        assert_bitwise_equal(got.numpy(), expected.numpy())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 4), (torch.float32, 2)])
def test_cuda_kernels_write_the_same_bytes(dtype: torch.dtype, bits: int, emulated: EmulatedLauncher) -> None:
    for got, expected in zip(packed(dtype, bits), packed_by_torch(dtype, bits), strict=True):
        assert_bitwise_equal(got.numpy(), expected.numpy())
    assert [name for name, _ in emulated.launches] == ["kv_flush"]


# --- NaN and infinity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_numbers_that_are_not_finite(kind: str, bad: float, path: str) -> None:
    state = KvState(KiviSpec(residual=32), 1, 1, 32, dtype=torch.bfloat16, device="cpu", name="layer 3")
    k, v = torch.randn(2, 1, 1, 100, 32).bfloat16()
    (k if kind == "keys" else v)[0, 0, 40, 3] = bad
    state.append(k, v)
    with pytest.raises(NonFiniteKeysError, match=f"layer 3: expected finite {kind}.* in 1 groups") as caught:
        state.flush()
    for call in (lambda: state.append(k, v), state.flush, lambda: state.crop(5), lambda: state.set_padding(None)):
        with pytest.raises(KvCacheError, match=r"layer 3: expected a cache that is whole.*NonFiniteKeysError"):
            call()
    assert "residual=None" in str(caught.value)
    state.reset()
    state.append(v if kind == "keys" else k, v if kind == "keys" else k)
    state.flush()
    assert state.slots == 100


def test_numbers_that_are_not_finite_on_a_gpu(emulated: EmulatedLauncher) -> None:
    """Counted by the kernel; without a GPU's queue the count is there at once."""
    state = KvState(KiviSpec(residual=32), 1, 1, 32, dtype=torch.bfloat16, device="cpu", name="layer 3")
    k, v = torch.randn(2, 1, 1, 100, 32).bfloat16()
    v[0, 0, 40, 3] = float("inf")
    state.append(k, v)
    with pytest.raises(NonFiniteKeysError, match=r"layer 3: expected finite values.* in 1 groups"):
        state.flush()
    state.reset()
    state.append(k, k)
    state.flush()


def test_padding_and_the_window_may_hold_anything(path: str) -> None:
    """Only what is quantized must be finite."""
    state = KvState(KiviSpec(residual=32), 1, 1, 32, dtype=torch.bfloat16, device="cpu")
    k = torch.randn(1, 1, 100, 32).bfloat16()
    k[0, 0, :10], k[0, 0, 98] = float("nan"), float("inf")
    state.append(k, k)
    state.set_padding((torch.arange(100) >= 10)[None, None, None])
    state.flush()
    assert not any(segment[..., state.layout.key_params : state.layout.value_codes].view(torch.bfloat16).isnan().any()
                   for segment in state.segments)  # fmt: skip


def test_a_watch_tells_once() -> None:
    watch = Watch(torch.device("cpu"))
    assert watch.look(True) == 0
    watch.count += 3
    assert watch.look(False) == watch.wait() == 3
    assert not watch.earlier()
