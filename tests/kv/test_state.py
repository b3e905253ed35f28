"""A cache in tensors against the lists of :mod:`bitforbit.kv.naive`, over calls, crops and reorders of all kinds."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from bitforbit.errors import KvCacheError, KvSpecError
from bitforbit.kv import kernels
from bitforbit.kv.layout import KvLayout, key_position, value_position
from bitforbit.kv.naive import NaiveRow
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState
from cuda_shim.emulation import EmulatedLauncher
from helpers.kv_states import Pair

SPECS = [
    KiviSpec(k_bits=2, v_bits=2, group=32, residual=32, v_group=16, sink=5),
    KiviSpec(k_bits=4, v_bits=2, group=32, residual=96),
    KiviSpec(k_bits=4, v_bits=4, group=64, residual=64, v_group=32, sink=1),
    KiviSpec(k_bits=8, v_bits=4, group=32, residual=128, v_group=16),
    KiviSpec(k_bits=2, v_bits=8, group=128, residual=128, v_group=32, sink=70),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("number", range(6))
def test_random_schedules(number: int, path: str) -> None:
    chance = random.Random(number)
    rows = chance.choice([1, 2, 3])
    prompt = chance.choice([1, 2, 40, 131, 700])
    start = [chance.choice([0, chance.randrange(prompt)]) for _ in range(rows)]
    pair = Pair(SPECS[number % 5], start, 2, chance.choice([2, 6]), dtype=DTYPES[number % 3], seed=number)
    pair.call(prompt)
    for _ in range(10):
        match chance.choice(["steps", "steps", "chunk", "crop", "reorder"]):
            case "steps":
                for _ in range(chance.choice([1, 5, 34])):
                    pair.call(1, mask=chance.random() < 0.5)
            case "chunk":
                pair.call(chance.choice([2, 9, 33, 200]))
            case "crop":
                pair.crop(chance.randrange(max(1, pair.state.slots - 150), pair.state.slots + 1))
            case "reorder":
                pair.reorder([chance.randrange(rows) for _ in range(rows)])


def test_with_cuda_kernels(emulated: EmulatedLauncher) -> None:
    pair = Pair(KiviSpec(k_bits=4, v_bits=2, residual=32, sink=2), [0, 40], 1, 2)
    pair.call(600)
    for count in (1, 1, 3, 40, 1):
        pair.call(count)
    pair.crop(590)
    pair.reorder([1, 1])
    pair.call(1)
    names = {name for name, _ in emulated.launches}
    assert {"kv_flush", "kv_attend", "kv_merge"} <= names


@pytest.mark.parametrize("tokens", [31, 32, 33, 63, 64, 65, 95, 96, 97])
def test_edges_of_the_window(tokens: int, path: str) -> None:
    pair = Pair(KiviSpec(k_bits=4, v_bits=4, residual=64), [0])
    pair.call(tokens)
    for _ in range(3):
        pair.call(1)
    spec = pair.spec
    assert spec.keys_quantized(tokens) == tokens // 64 * 64
    assert spec.values_quantized(tokens) == max(0, tokens - 64)
    assert pair.state.capacity <= 65


@pytest.mark.parametrize("sink", [1, 7, 40])
def test_a_prompt_shorter_than_the_sink_tokens(sink: int, path: str) -> None:
    pair = Pair(KiviSpec(residual=32, sink=sink), [0, 2])
    pair.call(3)
    for _ in range(sink + 70):
        pair.call(1)
    pair.crop(sink + 40)
    pair.crop(max(2, sink - 2))
    pair.call(60)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bytes_are_where_the_layout_says(spec: KiviSpec, path: str) -> None:
    """Every byte of a record, made code by code from the naive cache's."""
    pair = Pair(spec, [3], heads=1, query_heads=1, head_dim=64)
    pair.call(spec.sink + 2 * (spec.residual or 0) + 17)
    pair.call(1)
    assert bytes(pair.state.segments[0][0, 0].tolist()) == record_of(pair.naive.rows[0], pair.state.layout)
    assert len(pair.state.segments) == 1


def record_of(row: NaiveRow, layout: KvLayout) -> bytes:
    spec, dim = layout.spec, layout.head_dim
    record = bytearray(layout.record_bytes)

    def put(offset: int, word: int, shift: int, code: int) -> None:
        at = offset + 4 * word + shift // 8
        record[at] |= code << shift % 8

    def put_params(offset: int, number: torch.Tensor) -> None:
        record[offset : offset + 2] = number.view(torch.uint8).numpy().tobytes()

    for g, (codes, scale, zero) in enumerate(row.key_groups):
        for i in range(spec.group):
            tile, token = divmod(g * spec.group + i, 32)
            for c in range(dim):
                put(tile * layout.key_tile_bytes, *key_position(spec.k_bits, token, c), int(codes[0, c, i]))
        for c in range(dim):
            offset = layout.key_params + g * layout.key_group_bytes + 2 * c
            put_params(offset, scale[0, c : c + 1])
            put_params(offset + 2 * dim, zero[0, c : c + 1])
    for number, (codes, scale, zero) in enumerate(row.value_tokens):
        tile, token = divmod(number, 32)
        for c in range(dim):
            code = int(codes.flatten()[c])
            offset = layout.value_codes + tile * layout.value_tile_bytes
            put(offset, *value_position(spec.v_bits, dim, token, c), code)
        for g in range(dim // spec.value_group):
            offset = layout.value_params + tile * layout.value_params_tile_bytes + 4 * 32 * g + 2 * token
            put_params(offset, scale[0, g : g + 1])
            put_params(offset + 64, zero[0, g : g + 1])
    return bytes(record)


def filled(spec: KiviSpec, k: torch.Tensor, v: torch.Tensor, slots: int, start: list[int]) -> KvState:
    """A cache of the first slots' tokens ``[B, H, T, D]``."""
    state = KvState(spec, *k.shape[:2], k.shape[3], dtype=k.dtype, device="cpu")
    state.append(k[:, :, :slots], v[:, :, :slots])
    seen = torch.arange(slots) >= torch.tensor(start)[:, None]
    state.set_padding(seen[:, None, None])
    state.flush()
    return state


def random_tokens(slots: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(slots)
    k, v = (torch.randn((rows, 2, slots, 32), generator=random).bfloat16() for _ in range(2))
    return k, v


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("slots", [1200, 601, 513, 300, 97, 33, 8, 1])
def test_crop_leaves_the_bytes_of_a_shorter_cache(spec: KiviSpec, slots: int, path: str) -> None:
    k, v = random_tokens(1300)
    state, short = filled(spec, k, v, 1300, [0, 9]), filled(spec, k, v, slots, [0, min(9, slots)])
    state.crop(slots)
    assert state.starts == short.starts
    assert len(state.segments) == len(short.segments)
    assert all(torch.equal(x, y) for x, y in zip(state.segments, short.segments, strict=True))


# --- calls ----------------------------------------------------------------------------------------------------------


def test_tokens_may_be_dropped_before_the_flush(path: str) -> None:
    """As assisted decoding does with a draft that was not right: no trace of it is left."""
    spec = KiviSpec(residual=32, sink=3)
    k, v = random_tokens(212)
    state, expected = filled(spec, k, v, 200, [0, 4]), filled(spec, k, v, 200, [0, 4])
    state.append(k[:, :, 200:], v[:, :, 200:])
    state.crop(206)
    state.flush()
    expected.append(k[:, :, 200:206], v[:, :, 200:206])
    expected.flush()
    assert_same_cache(state, expected)
    state.append(k[:, :, 206:207], v[:, :, 206:207])
    state.crop(206)
    state.flush()
    assert_same_cache(state, expected)
    state.append(k[:, :, 206:], v[:, :, 206:])
    state.crop(203)
    expected.crop(203)
    assert_same_cache(state, expected)


def test_padding_may_go_on_in_later_calls(path: str) -> None:
    """As with a prompt in chunks whose first one is all padding for a row."""
    k, v = random_tokens(120)
    seen = (torch.arange(120) >= torch.tensor([[0], [50]]))[:, None, None]
    state = KvState(KiviSpec(residual=32), 2, 2, 32, dtype=torch.bfloat16, device="cpu")
    for first, last in ((0, 40), (40, 45), (45, 46), (46, 90), (90, 120)):
        state.append(k[:, :, first:last], v[:, :, first:last])
        state.set_padding(seen[..., :last])
        state.flush()
    assert_same_cache(state, filled(KiviSpec(residual=32), k, v, 120, [0, 50]))


def test_an_empty_cache_and_empty_rows(path: str) -> None:
    state = KvState(KiviSpec(residual=32), 2, 1, 32, dtype=torch.bfloat16, device="cpu")
    state.flush()
    state.crop(0)
    assert [tuple(x.shape) for x in state.dequantized()] == [(2, 1, 0, 32)] * 2
    pair = Pair(KiviSpec(residual=32), [3, 0])
    pair.call(3)
    assert pair.state.tokens(0) == 0
    pair.crop(2)
    assert pair.state.starts == (2, 0)
    pair.crop(0)
    assert pair.state.slots == 0


@pytest.mark.parametrize("count", [1, 2, 300])
def test_without_quantization_keys_and_values_are_views(count: int) -> None:
    state = KvState(KiviSpec(residual=None), 2, 3, 24, dtype=torch.float16, device="cpu")
    seen_k, seen_v = [], []
    for number in (count, 1, 1, 70, 1):
        k, v = torch.randn(2, 3, number, 24).half(), torch.randn(2, 3, number, 24).half()
        state.append(k, v)
        state.flush()
        seen_k.append(k)
        seen_v.append(v)
        assert torch.equal(state.exact_keys(), torch.cat(seen_k, 2))
        assert torch.equal(state.exact_values(), torch.cat(seen_v, 2))
    assert state.exact_keys().data_ptr() == state.window_k.data_ptr()
    assert not state.segments
    with pytest.raises(KvCacheError, match="without quantization"):
        KvState(KiviSpec(), 1, 1, 32, dtype=torch.float16, device="cpu").exact_keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query", [1, 5])
def test_attention_over_exact_views_has_the_bits_of_plain_tensors(dtype: torch.dtype, query: int) -> None:
    state = KvState(KiviSpec(residual=None), 2, 2, 64, dtype=dtype, device="cpu")
    k, v = torch.randn(2, 2, 200, 64).to(dtype), torch.randn(2, 2, 200, 64).to(dtype)
    state.append(k[:, :, :150], v[:, :, :150])
    state.flush()
    state.append(k[:, :, 150:], v[:, :, 150:])
    state.flush()
    q = torch.randn(2, 4, query, 64).to(dtype)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(
        sdpa(q, state.exact_keys(), state.exact_values(), enable_gqa=True), sdpa(q, k, v, enable_gqa=True)
    )


# --- rows by themselves ---------------------------------------------------------------------------------------------


def assert_same_cache(a: KvState, b: KvState) -> None:
    assert a.slots == b.slots
    assert a.starts == b.starts
    assert len(a.segments) == len(b.segments)
    assert all(torch.equal(x, y) for x, y in zip(a.segments, b.segments, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.dequantized(), b.dequantized(), strict=True))


def test_copies_and_pickles_are_caches_of_their_own(path: str) -> None:
    pair = Pair(KiviSpec(residual=32, sink=2), [0, 5])
    pair.call(100)
    for twin in (copy.deepcopy(pair.state), pickle.loads(pickle.dumps(pair.state))):
        assert_same_cache(twin, pair.state)
        before = pair.state.nbytes
        twin.append(pair.tensor(2, 50), pair.tensor(2, 50))
        twin.flush()
        assert pair.state.slots == 100
        assert pair.state.nbytes == before


def test_repeat_and_select(path: str) -> None:
    pair = Pair(KiviSpec(residual=32, sink=2), [0, 5])
    pair.call(100)
    once = copy.deepcopy(pair.state)
    pair.state.repeat(3)
    assert pair.state.starts == (0, 0, 0, 5, 5, 5)
    pair.state.select(torch.tensor([True, False, False, True, False, False]))
    assert_same_cache(pair.state, once)
    pair.state.select([1])
    assert pair.state.starts == (5,)
    assert torch.equal(pair.state.segments[0], once.segments[0][1:])


def test_memory_is_what_the_layout_says() -> None:
    spec = KiviSpec(k_bits=2, v_bits=2, residual=128)
    state = KvState(spec, 1, 2, 64, dtype=torch.bfloat16, device="cpu")
    x = torch.randn(1, 2, 1664, 64).bfloat16()
    state.append(x, x)
    state.flush()
    exact = 2 * 2 * 129 * 64 * 2
    assert len(state.segments) == 4  # 1664 keys are quantized, 1536 values
    assert state.nbytes == 4 * 2 * state.layout.record_bytes + exact + 4
    assert state.layout.record_bytes * 8 == 512 * 64 * (spec.key_bits_per_element + spec.value_bits_per_element)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    spec = KiviSpec(residual=32)
    state = KvState(spec, 2, 2, 32, dtype=torch.bfloat16, device="cpu", name="layer 7")
    x = torch.zeros(2, 2, 3, 32, dtype=torch.bfloat16)
    for wrong in (x[:1], x[:, :1], x[..., :16], x.float(), x[0]):
        with pytest.raises(KvCacheError, match="layer 7: expected keys and values"):
            state.append(wrong, wrong)
    state.append(x, x)
    for change in (lambda: state.append(x, x), lambda: state.reorder(torch.tensor([0])), lambda: state.to("cpu")):
        with pytest.raises(KvCacheError, match=r"layer 7: expected flush\(\)"):
            change()
    state.flush()
    with pytest.raises(KvCacheError, match="0 or more slots"):
        state.crop(-1)
    with pytest.raises(KvSpecError, match="bfloat16, float16 or float32"):
        KvState(spec, 1, 1, 32, dtype=torch.float64, device="cpu")
    with pytest.raises(KvSpecError, match="v_group=16"):
        KvState(spec, 1, 1, 80, dtype=torch.bfloat16, device="cpu")


def test_the_table_of_segments_stays_where_it_is() -> None:
    state = KvState(KiviSpec(residual=32), 1, 1, 32, dtype=torch.bfloat16, device="cpu")
    addresses = set()
    for tokens in (1, 600, 600, 256 * 512, 300 * 512):
        state.room_for(tokens)
        addresses.add(kernels._table(state))
        assert state.table is not None
        assert state.table[: len(state.segments)].tolist() == [segment.data_ptr() for segment in state.segments]
        assert len(addresses) == (2 if tokens == 300 * 512 else 1)
    twin = copy.deepcopy(state)
    kernels._table(twin)
    assert twin.table is not None
    assert twin.table[0] == twin.segments[0].data_ptr() != state.segments[0].data_ptr()
