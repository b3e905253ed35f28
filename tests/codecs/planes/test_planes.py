"""The native ``planes`` kernels against the naive reference, bit for bit, on every instruction set of this CPU."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitforbit import cpu, dtypes
from bitforbit.codecs.base import EncodedTensor
from bitforbit.codecs.planes import PlanesCodec, naive
from bitforbit.codecs.planes.layout import PLANE_WIDTHS, Layout, matrix_view
from bitforbit.errors import CorruptTensorError, UnknownIsaError, UsageError
from helpers.bits import assert_bitwise_equal

CODEC = PlanesCodec()
ISAS = [name for name, supported in cpu.implementations().items() if supported]
KINDS = list(PLANE_WIDTHS)
SHAPES = [
    (1, 1),
    (1, 63),
    (1, 64),
    (1, 65),
    (2, 3),
    (15, 64),
    (16, 64),
    (17, 64),
    (17, 130),
    (33, 200),
    (5, 1000),
    (64, 128),
]


def words_to_bytes(words: np.ndarray, kind: str) -> np.ndarray:
    itemsize = dtypes.FLOAT_LAYOUTS[kind].itemsize
    return np.frombuffer(words.astype(f"<u{itemsize}").tobytes(), np.uint8)


def hostile_words(kind: str, n: int, seed: int, style: str) -> np.ndarray:
    """Bit patterns whose exponents are random, trained-like, constant, or far apart."""
    rng = np.random.default_rng(seed)
    layout = dtypes.FLOAT_LAYOUTS[kind]
    rest = rng.integers(0, 1 << (1 + layout.mantissa_bits), n).astype(np.uint32)
    top = 1 << layout.exponent_bits
    exponent = {
        "random": lambda: rng.integers(0, top, n),
        "trained": lambda: np.clip(top // 2 - rng.geometric(0.5, n), 0, top - 1),
        "constant": lambda: np.full(n, top - 1),
        "far": lambda: rng.choice([0, 1, top // 2, top - 2, top - 1], n),
        "zeros": lambda: np.where(rng.random(n) < 0.7, 0, rng.integers(0, top, n)),
    }[style]()
    return dtypes.join(exponent.astype(np.uint32), rest, layout)


def tables_of(encoded: EncodedTensor) -> list[list[int]]:
    """The code tables that the encoder chose."""
    layout = Layout.from_config(encoded.config, encoded.dtype, encoded.shape)
    raw = encoded.parts["code"][: 16 * layout.tables].reshape(-1, 16)
    return [row[:9].tolist() for row in raw]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["random", "trained", "constant", "far", "zeros"])
def test_native_equals_naive(isa: str, kind: str, style: str) -> None:
    for seed, shape in enumerate(SHAPES):
        words = hostile_words(kind, shape[0] * shape[1], seed, style)
        data = words_to_bytes(words, kind)
        with cpu.force(isa):
            assert cpu.active() == isa
            encoded = CODEC.encode_always(data, kind, shape, kind, 2, rows_per_table=16)
            out = np.full(data.nbytes, 0xAA, np.uint8)
            CODEC.decode(encoded, out, None, 2)
        np.testing.assert_array_equal(out, data)
        layout = Layout.from_config(encoded.config, kind, shape)
        expected = naive.encode(words, layout, tables_of(encoded))
        for name, part in expected.items():
            np.testing.assert_array_equal(encoded.parts[name], part, err_msg=f"{shape} {name}")
        np.testing.assert_array_equal(naive.decode(dict(encoded.parts), layout), words)


@pytest.mark.parametrize("isa", ISAS)
def test_every_pattern_of_two_bytes(isa: str) -> None:
    words = np.arange(1 << 16, dtype="<u2")
    for kind in ("BF16", "F16"):
        for order in (words, np.random.default_rng(1).permutation(words)):
            data = np.frombuffer(order.tobytes(), np.uint8)
            with cpu.force(isa):
                encoded = CODEC.encode_always(data, kind, (256, 256), kind, 1)
                out = np.empty_like(data)
                CODEC.decode(encoded, out, None, 1)
            np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("isa", ISAS)
def test_every_pattern_of_one_byte(isa: str) -> None:
    data = np.tile(np.arange(256, dtype=np.uint8), 9)[:-7]
    for kind in ("F8_E4M3", "F8_E5M2"):
        with cpu.force(isa):
            encoded = CODEC.encode_always(data, kind, data.shape, kind, 1)
            out = np.empty_like(data)
            CODEC.decode(encoded, out, None, 1)
        np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("isa", ISAS)
def test_widened_bf16_is_stored_at_bf16_size(isa: str) -> None:
    words = hostile_words("BF16", 48 * 100, 0, "trained") << 16
    data = words_to_bytes(words, "F32")
    with cpu.force(isa):
        encoded = CODEC.encode(data, "F32", (48, 100), 1)
        assert encoded is not None
        assert encoded.config["kind"] == "BF16"
        assert encoded.nbytes < data.nbytes * 0.4
        out = np.empty_like(data)
        CODEC.decode(encoded, out, None, 1)
    np.testing.assert_array_equal(out, data)
    words[17] |= 1
    encoded = CODEC.encode_always(words_to_bytes(words, "F32"), "F32", (48, 100), "F32", 1)
    assert encoded.config["kind"] == "F32"


@settings(deadline=None, max_examples=60)
@given(
    isa=st.sampled_from(ISAS),
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    seed=st.integers(0, 1 << 30),
    style=st.sampled_from(["random", "trained", "constant", "far", "zeros"]),
    threads=st.integers(1, 4),
    data=st.data(),
)
def test_any_row_range(
    isa: str, kind: str, rows: int, cols: int, seed: int, style: str, threads: int, data: st.DataObject
) -> None:
    original = words_to_bytes(hostile_words(kind, rows * cols, seed, style), kind)
    begin = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(begin, rows))
    with cpu.force(isa):
        encoded = CODEC.encode_always(original, kind, (rows, cols), kind, threads)
        row_bytes = original.nbytes // rows
        view = Layout.from_config(encoded.config, kind, (rows, cols))
        assert (view.rows, view.cols) == (rows, cols)
        out = np.full((end - begin) * row_bytes, 0x55, np.uint8)
        CODEC.decode(encoded, out, (begin, end), threads)
    np.testing.assert_array_equal(out, original[begin * row_bytes : end * row_bytes])


def test_same_bytes_whatever_the_machine() -> None:
    data = words_to_bytes(hostile_words("BF16", 300 * 1100, 3, "trained"), "BF16")
    results = []
    for isa in ISAS:
        for threads in (1, 3):
            with cpu.force(isa):
                results.append(CODEC.encode_always(data, "BF16", (300, 1100), "BF16", threads))
    for other in results[1:]:
        assert other.config == results[0].config
        for name in CODEC.part_names:
            np.testing.assert_array_equal(other.parts[name], results[0].parts[name])


def test_tables_adapt_to_rows() -> None:
    rng = np.random.default_rng(0)
    scale = np.repeat([1e-6, 1e-2, 1.0, 1e3], 64)[:, None]
    floats = (rng.standard_normal((256, 512)) * scale).astype(np.float32)
    data = np.frombuffer((floats.view(np.uint32) >> 16).astype("<u2").tobytes(), np.uint8)
    encoded = CODEC.encode_always(data, "BF16", (256, 512), "BF16", 1)
    one_table = CODEC.encode_always(data, "BF16", (256, 512), "BF16", 1, rows_per_table=256)
    assert encoded.config["rows_per_table"] == 64
    assert encoded.nbytes < one_table.nbytes


def test_gaussian_size() -> None:
    floats = (np.random.default_rng(0).standard_normal((1024, 4096)) * 0.02).astype(np.float32)
    rounded = floats.view(np.uint32) + 0x7FFF + ((floats.view(np.uint32) >> 16) & 1)
    data = np.frombuffer((rounded >> 16).astype("<u2").tobytes(), np.uint8)
    encoded = CODEC.encode(data, "BF16", (1024, 4096), 1)
    assert encoded is not None
    assert 8 * encoded.nbytes / floats.size < 10.70


def test_what_does_not_pay_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 1 << 16, dtype=np.uint8)
    for dtype in ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2", "I32", "U8", "BOOL", "F64"):
        itemsize = dtypes.bits(dtype) // 8
        assert CODEC.encode(noise, dtype, (noise.nbytes // itemsize,), 1) is None


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((), (1, 1)), ((7,), (1, 7)), ((4096 * 100,), (100, 4096)), ((65537,), (1, 65537)), ((10, 20), (10, 20)),
        ((8, 300, 64), (2400, 64)), ((32, 16, 3, 3), (32, 144)), ((2, 3, 4), (2, 12)),
    ],
)  # fmt: skip
def test_matrix_view(shape: tuple[int, ...], view: tuple[int, int]) -> None:
    assert matrix_view(shape) == view


def damaged(parts: dict[str, np.ndarray], name: str, at: int, value: int) -> dict[str, np.ndarray]:
    changed = {key: part.copy() for key, part in parts.items()}
    changed[name][at] = value
    return changed


def test_contradictions_are_refused() -> None:
    data = words_to_bytes(hostile_words("BF16", 40 * 100, 0, "trained"), "BF16")
    good = CODEC.encode_always(data, "BF16", (40, 100), "BF16", 1)
    out = np.empty_like(data)
    bad_parts = {
        "more level-2 digits than weights": damaged(dict(good.parts), "code", 16 + 2, 0xFF),
        "fewer level-2 digits than 3s": damaged(dict(good.parts), "code", 16, int(good.parts["code"][16]) ^ 1),
        "a 3 that has no digit behind it": damaged(dict(good.parts), "digits", 0, 0xFF),
        "short tails": {**good.parts, "tails": good.parts["tails"][:-64]},
        "short digits": {**good.parts, "digits": good.parts["digits"][:-64]},
        "short sign_mantissa": {**good.parts, "sign_mantissa": good.parts["sign_mantissa"][:-64]},
        "long code": {**good.parts, "code": np.concatenate([good.parts["code"], np.zeros(64, np.uint8)])},
        "no code": {key: part for key, part in good.parts.items() if key != "code"},
    }
    for cause, parts in bad_parts.items():
        tensor = EncodedTensor("planes", 1, "BF16", (40, 100), good.config, parts)
        with pytest.raises(CorruptTensorError, match="expected") as caught:
            CODEC.decode(tensor, out, None, 1)
        assert caught.value, cause
    bad_configs = [
        {}, {"kind": "BF17"}, {"rows": 0}, {"rows": -40}, {"rows": 41}, {"cols": 1 << 60}, {"rows_per_table": 17},
        {"rows_per_table": 0}, {"rows": True}, {"rows": 40.0}, {"rows": "40"}, {"kind": "F16"},
        {"rows": 80, "cols": 50},
    ]  # fmt: skip
    for config in bad_configs:
        changed = {**good.config, **config} if config else {}
        tensor = EncodedTensor("planes", 1, "BF16", (40, 100), changed, good.parts)
        with pytest.raises(CorruptTensorError):
            CODEC.decode(tensor, out, None, 1)
    with pytest.raises(UsageError):
        CODEC.decode(good, out[:-1], None, 1)
    with pytest.raises(UsageError):
        CODEC.decode(good, out, (0, 41), 1)


@settings(deadline=None, max_examples=150)
@given(
    isa=st.sampled_from(ISAS),
    kind=st.sampled_from(KINDS),
    part=st.sampled_from(CODEC.part_names),
    seed=st.integers(0, 1 << 30),
    flips=st.integers(1, 40),
)
def test_damage_never_crashes(isa: str, kind: str, part: str, seed: int, flips: int) -> None:
    rng = np.random.default_rng(seed)
    data = words_to_bytes(hostile_words(kind, 37 * 150, seed, "zeros"), kind)
    good = CODEC.encode_always(data, kind, (37, 150), kind, 1, rows_per_table=16)
    parts = {key: value.copy() for key, value in good.parts.items()}
    at = rng.integers(0, parts[part].size, flips)
    parts[part][at] = rng.integers(0, 256, flips)
    out = np.empty_like(data)
    with cpu.force(isa):
        try:
            CODEC.decode(EncodedTensor("planes", 1, kind, (37, 150), good.config, parts), out, None, 2)
        except CorruptTensorError:
            noticed = True
        else:
            noticed = False
    assert not (noticed and part == "sign_mantissa"), "every sign and mantissa is legal"


def test_worked_example_of_the_format() -> None:
    text = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
    block = text[text.index("### 3.4") :].split("```")[1]
    parts: dict[str, bytearray] = {}
    for line in block.strip().splitlines():
        name, _, offset, content = re.match(r"(\w*)(\s+)([0-9a-f]{2})  (.*)", line).groups()  # type: ignore[union-attr]
        if name:
            current = parts.setdefault(name, bytearray())
        zeros = re.match(r"\((\d+) zeros\)", content)
        assert len(current) == int(offset, 16)
        current += bytes(int(zeros[1])) if zeros else bytes.fromhex(content[:47])
    exponents = [120] * 66
    exponents[10:12] = [121, 121]
    exponents[20:29] = range(110, 119)
    words = np.array([e << 7 | i for i, e in enumerate(exponents)], np.uint32)
    encoded = CODEC.encode_always(words_to_bytes(words, "BF16"), "BF16", (1, 66), "BF16", 1)
    assert encoded.config == {"kind": "BF16", "rows": 1, "cols": 66, "rows_per_table": 64}
    assert {name: part.tobytes() for name, part in encoded.parts.items()} == {k: bytes(v) for k, v in parts.items()}


def test_forcing_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFORBIT_ISA", "avx1024")
    with pytest.raises(UnknownIsaError, match="avx1024"):
        cpu.active()
    monkeypatch.setenv("BITFORBIT_ISA", "scalar")
    assert cpu.active() == "scalar"
    with pytest.raises(UnknownIsaError), cpu.force("neon2"):
        pass


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFORBIT_THREADS", "3")
    assert cpu.default_threads() == 3
    for bad in ("0", "-1", "many", "٣"):
        monkeypatch.setenv("BITFORBIT_THREADS", bad)
        with pytest.raises(UsageError):
            cpu.default_threads()


@pytest.mark.parametrize("cols", [4096, 4128])
def test_outputs_that_outgrow_the_caches(cols: int) -> None:
    """From 32 MiB on, outputs may be written past the caches; where they do not lie on 64-byte boundaries, not."""
    rows = 4112
    words = np.random.default_rng(cols).integers(0, 1 << 16, (rows, cols), dtype=np.uint16)
    words[:, : cols // 2] = words[:, : cols // 2] & 0x81FF | 0x3C00
    data = words.reshape(-1).view(np.uint8)
    encoded = CODEC.encode_always(data, "BF16", (rows, cols), "BF16", 2)
    room = np.empty(data.size + 64, np.uint8)
    for shift in (-room.ctypes.data % 64, (-room.ctypes.data + 2) % 64):
        for begin, end in ((0, rows), (5, rows - 3)):
            out = room[shift : shift + 2 * (end - begin) * cols]
            out[:] = 0
            CODEC.decode(encoded, out, (begin, end), 2)
            assert_bitwise_equal(out, data[2 * begin * cols : 2 * end * cols])
