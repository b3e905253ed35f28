"""The fast DF11 codec against the plain one, on every kind of stream that the format's rules distinguish."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitforbit.codecs.df11 import TENSOR_NAMES, Df11Unit, check_unit, decode_unit, encode_unit, matrix_bounds, naive
from bitforbit.codecs.df11.codebook import EOF, build
from bitforbit.errors import Df11UnrepresentableError, UnsupportedDtypeError, UsageError

Words = npt.NDArray[np.uint16]


def words_of(exponents: npt.ArrayLike, seed: int = 0) -> Words:
    """BF16 words with these exponents and random signs and mantissas."""
    exponents = np.asarray(exponents, np.uint16)
    noise = np.random.default_rng(seed).integers(0, 1 << 16, exponents.size, dtype=np.uint16)
    return (noise & 0x807F) | exponents << 7


def shuffled(counts: dict[int, int], seed: int = 0) -> Words:
    exponents = np.repeat(list(counts), list(counts.values()))
    return words_of(np.random.default_rng(seed).permutation(exponents), seed)


def assert_same_unit(one: Df11Unit, other: Df11Unit) -> None:
    for name in TENSOR_NAMES:
        a, b = one.tensors()[name], other.tensors()[name]
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        assert a.tobytes() == b.tobytes(), f"{name} differs first at {np.flatnonzero(a != b)[0]}"


def assert_round_trip(words: Words, *, compare_naive: bool = True) -> Df11Unit:
    unit = encode_unit([words])
    if compare_naive:
        assert_same_unit(unit, naive.encode_unit([words]))
        np.testing.assert_array_equal(naive.decode_unit(unit), words)
    np.testing.assert_array_equal(decode_unit(unit), words)
    return unit


def fibonacci(count: int) -> list[int]:
    values = [1, 1]
    while len(values) < count:
        values.append(values[-1] + values[-2])
    return values


def test_every_short_length() -> None:
    words = shuffled(dict(zip(range(110, 126), fibonacci(16), strict=True)), seed=3)
    for size in range(1, 600):
        assert_round_trip(words[:size])


@pytest.mark.parametrize("size", [*range(4085, 4100), 8191, 8192, 8193])
def test_block_boundaries(size: int) -> None:
    exponents = np.resize(np.arange(200, dtype=np.uint16), size)
    assert_round_trip(words_of(exponents))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.integers(0, 239), st.integers(1, 120), min_size=1, max_size=60), st.integers(0, 1000))
def test_random_histograms(counts: dict[int, int], seed: int) -> None:
    assert_round_trip(shuffled(counts, seed))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=240), st.integers(1, 3))
def test_random_codebooks(logs: list[int], ties: int) -> None:
    counts = np.zeros(256, np.int64)
    counts[: len(logs)] = [max(1 << log, ties) for log in logs]
    expected = naive.code_table(Counter({e: int(c) for e, c in enumerate(counts) if c}))
    book = build(counts)
    np.testing.assert_array_equal(book.luts, naive.lookup_tables(expected))
    for exponent, code in expected.items():
        if exponent == EOF:
            assert (book.eof.bits, book.eof.length) == (int(code, 2), len(code))
        else:
            assert (book.codes[exponent], book.lengths[exponent]) == (int(code, 2), len(code))


def test_length_limit() -> None:
    counts = np.zeros(256, np.int64)
    counts[:45] = fibonacci(45)
    book = build(counts)
    expected = naive.code_table(Counter({e: int(counts[e]) for e in range(45)}))
    assert max(map(len, naive.huffman(Counter({e: int(counts[e]) for e in range(45)})).values())) > 32
    assert book.lengths.max() <= 32
    np.testing.assert_array_equal(book.luts, naive.lookup_tables(expected))


def test_codes_of_32_bits() -> None:
    counts = dict(enumerate(fibonacci(32)))
    words = shuffled(counts)
    unit = assert_round_trip(words, compare_naive=False)
    assert unit.luts[-1].max() == 32


def test_last_code_runs_into_a_block_of_its_own() -> None:
    """Format section 7.2: without room for the end mark no code starts in the last block, which gets no position."""
    rare = dict(zip(range(100, 116), fibonacci(16), strict=True))
    rare_sum = sum(rare.values())
    counts = {**rare, 120: 4 * rare_sum}
    lengths = build(np.bincount(list(counts), list(counts.values()), 256).astype(np.int64)).lengths
    assert lengths[120] == 1
    rest = sum(int(lengths[e]) * c for e, c in rare.items())
    counts[120] = 32768 + 8 - rest
    assert counts[120] > rare_sum
    words = shuffled(counts)
    words = words[np.argsort((words >> 7 & 0xFF) == 100, kind="stable")]  # the longest code last
    unit = assert_round_trip(words)
    assert lengths[100] > 8
    assert unit.num_blocks == 2
    assert unit.output_positions.size == 4 * 2
    assert check_unit(unit).tolist() == [0, words.size, words.size]


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 5000, 40000])
@pytest.mark.parametrize("exponent", [0, 127, 239])
def test_one_exponent(exponent: int, size: int) -> None:
    unit = assert_round_trip(words_of(np.full(size, exponent)), compare_naive=size <= 5000)
    assert unit.luts.shape == (2, 256)
    assert unit.luts[-1, exponent] == 2


def test_end_mark_at_the_root_tables_first_entry() -> None:
    unit = assert_round_trip(words_of([5, 5, 6, 6, 6]))
    assert unit.luts[0, 0] == unit.luts[0].min()
    book = build(np.bincount([5, 5, 6, 6, 6], minlength=256))
    assert book.eof.bits == 0


def test_more_than_seventeen_tables_are_avoided() -> None:
    counts = {0: 4000, **dict.fromkeys(range(1, 240), 10)}
    plain = naive.huffman(Counter(counts))
    assert len(naive.prefixes(plain)) > 17
    unit = assert_round_trip(shuffled(counts))
    assert unit.luts.shape[0] <= 18


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_several_matrices(threads: int) -> None:
    rng = np.random.default_rng(1)
    sizes = [70001, 1, 200000, 65536]
    values = (rng.standard_normal(sum(sizes), np.float32) * 0.02).view(np.uint32) >> 16
    words = values.astype(np.uint16)
    matrices = np.split(words, np.cumsum(sizes)[:-1])
    unit = encode_unit(matrices, threads=threads)
    assert_same_unit(unit, encode_unit(matrices, threads=3))
    one = encode_unit([words], threads=threads)
    assert one.encoded_exponent.tobytes() == unit.encoded_exponent.tobytes()
    assert one.gaps.tobytes() == unit.gaps.tobytes()
    np.testing.assert_array_equal(decode_unit(unit, threads=threads), words)
    assert [end - begin for begin, end in matrix_bounds(unit)] == sizes


def test_input_that_is_not_contiguous() -> None:
    words = words_of(np.arange(600) % 50).reshape(20, 30)
    np.testing.assert_array_equal(decode_unit(encode_unit([words.T])), words.T.reshape(-1))
    unaligned = np.frombuffer(b"x" + words.tobytes(), np.uint8)[1:].view(np.uint16)
    np.testing.assert_array_equal(decode_unit(encode_unit([unaligned])), words.reshape(-1))


@pytest.mark.parametrize("word", [0x7800, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F])
def test_large_exponents_are_refused_by_name(word: int) -> None:
    words = words_of(np.full(100, 120))
    words[50] = word
    with pytest.raises(Df11UnrepresentableError, match=f"b.weight.*exponent {word >> 7 & 0xFF}"):
        encode_unit([words_of([1, 2]), words], names=["a.weight", "b.weight"])


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError):
        encode_unit([])
    with pytest.raises(UsageError):
        encode_unit([np.empty(0, np.uint16)])
    with pytest.raises(UnsupportedDtypeError):
        encode_unit([np.zeros(3, np.float32)])  # type: ignore[list-item]
    unit = encode_unit([words_of([1, 2, 3])])
    with pytest.raises(UsageError):
        decode_unit(unit, out=np.empty(2, np.uint16))
