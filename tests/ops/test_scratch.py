from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.ops.scratch import SCRATCH, ScratchPool
from torch_helpers import assert_same_bits, encode, gaussian


def test_a_buffer_is_used_again():
    pool = ScratchPool()
    first = pool.borrow(1000)
    pool.give_back(first)
    assert pool.borrow(500) is first
    assert pool.kept_bytes == 0
    pool.give_back(first)
    assert pool.kept_bytes == 1000


def test_a_larger_one_replaces_a_smaller_one():
    pool = ScratchPool()
    pool.give_back(pool.borrow(1000))
    larger = pool.borrow(2000)
    assert larger.nbytes == 2000
    pool.give_back(larger)
    assert pool.kept_bytes == 2000


def test_borrowers_at_once_have_buffers_of_their_own():
    pool = ScratchPool()
    first, second = pool.borrow(1000), pool.borrow(800)
    assert first is not second
    pool.give_back(first)
    pool.give_back(second)
    assert pool.borrow(1000) is first
    pool.clear()
    assert pool.kept_bytes == 0


def test_the_limit():
    pool = ScratchPool(limit=1500)
    first, second = pool.borrow(1000), pool.borrow(1000)
    pool.give_back(first)
    pool.give_back(second)
    assert pool.kept_bytes == 1000
    pool.clear()
    pool.give_back(pool.borrow(1501))
    assert pool.kept_bytes == 0


def test_matrices_of_all_dtypes():
    buffer = ScratchPool().borrow(1001)
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e5m2, torch.bfloat16):
        matrix = buffer.matrix(5, 7, dtype)
        assert (matrix.shape, matrix.dtype, matrix.is_contiguous()) == ((5, 7), dtype, True)
        assert matrix.data_ptr() == buffer.bytes(1).ctypes.data


def test_linears_in_several_threads():
    SCRATCH.clear()
    weights = [gaussian((48 + 16 * i, 96), seed=i) for i in range(6)]
    encoded = [encode(weight) for weight in weights]
    x = gaussian((5, 96), seed=9)

    def check(i: int) -> None:
        parts, how = encoded[i % 6]
        assert_same_bits(ops.linear(x, *parts, None, *how, "exact"), functional.linear(x, weights[i % 6]))

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(check, range(200)))
    assert SCRATCH.kept_bytes <= 4 * max(weight.nbytes for weight in weights)


def test_no_output_lies_in_scratch():
    weight = gaussian((1, 1))
    parts, how = encode(weight)
    for x in (gaussian((1,)), gaussian((1, 1)), gaussian((1, 1, 1))):
        first = ops.linear(x, *parts, None, *how, "exact")
        kept = first.clone()
        other, other_how = encode(gaussian((1, 1), seed=5))
        ops.linear(x, *other, None, *other_how, "exact")
        assert_same_bits(first, kept)
