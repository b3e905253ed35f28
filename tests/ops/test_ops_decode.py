from __future__ import annotations

import pytest
import torch

from bitforbit import ops
from bitforbit.errors import BitforbitError, CorruptTensorError, UsageError
from torch_helpers import KINDS, assert_same_bits, encode, gaussian, random_bits

SHAPES = [(1, 1), (1, 63), (15, 64), (16, 65), (17, 64), (33, 130), (100, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("make", [gaussian, random_bits])
def test_decode_gives_every_bit(shape, dtype, make):
    weight = make(shape, dtype)
    parts, how = encode(weight)
    rows = shape[0]
    assert_same_bits(ops.decode(*parts, *how, 0, rows), weight)
    for begin, end in ((0, 0), (rows // 2, rows), (rows - 1, rows), (rows // 3, rows // 3 + 1)):
        assert_same_bits(ops.decode(*parts, *how, begin, end), weight[begin:end])


def test_fp32_coded_as_bf16():
    weight = gaussian((40, 96)).float()
    parts, how = encode(weight, "BF16")
    assert_same_bits(ops.decode(*parts, *how, 0, 40), weight)
    assert_same_bits(ops.decode(*parts, *how, 7, 31), weight[7:31])


def test_decode_refuses():
    weight = gaussian((40, 96))
    parts, how = encode(weight)
    with pytest.raises(UsageError, match="rows within 0 to 40, got 3 to 41"):
        ops.decode(*parts, *how, 3, 41)
    with pytest.raises(UsageError, match="rows within"):
        ops.decode(*parts, *how, 5, 4)
    with pytest.raises(CorruptTensorError):
        ops.decode(parts[0][:-64].clone(), *parts[1:], *how, 0, 40)
    with pytest.raises(CorruptTensorError):
        ops.decode(*parts, "BF16", 41, 96, how[3], torch.bfloat16, 0, 41)
    with pytest.raises(CorruptTensorError, match="coded as itself"):
        ops.decode(*parts, "BF16", 40, 96, how[3], torch.float16, 0, 40)
    with pytest.raises(BitforbitError, match="digits to be contiguous uint8"):
        ops.decode(parts[0], parts[1].float(), *parts[2:], *how, 0, 40)
    with pytest.raises(BitforbitError, match="tails to be contiguous uint8"):
        ops.decode(*parts[:3], parts[3].repeat_interleave(2)[::2], *how, 0, 40)


def test_fakes():
    parts, how = encode(gaussian((40, 96)))
    meta = [part.to("meta") for part in parts]
    assert ops.decode(*meta, *how, 3, 9).shape == (6, 96)
    got = ops.embedding(torch.zeros(2, 3, dtype=torch.int64, device="meta"), *meta, *how)
    assert (got.shape, got.dtype) == ((2, 3, 96), torch.bfloat16)
    x = torch.zeros(2, 3, 96, dtype=torch.bfloat16, device="meta")
    assert ops.linear(x, *meta, None, *how, "exact").shape == (2, 3, 40)


IDS = [
    torch.tensor(7),
    torch.tensor([199]),
    torch.tensor([[0, 0, 15, 16], [31, 32, 199, 100]]),
    torch.arange(200).flip(0),
    torch.zeros(2, 0, dtype=torch.int64),
    torch.randint(0, 200, (3, 4, 5), generator=torch.Generator().manual_seed(0)),
    torch.tensor([5, 5, 150], dtype=torch.int32),
    torch.arange(40).reshape(5, 8).t(),
]


@pytest.mark.parametrize("ids", IDS, ids=lambda ids: "x".join(map(str, ids.shape)) or "scalar")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_embedding(ids, dtype):
    weight = random_bits((200, 72), dtype)
    parts, how = encode(weight)
    assert_same_bits(ops.embedding(ids, *parts, *how), weight.view(torch.uint8).view(200, -1)[ids.long()].view(dtype))


@pytest.mark.parametrize("ids", [[-1], [200], [3, 250, 4], [[-5, 3]]])
def test_embedding_refuses_ids_as_torch_does(ids):
    weight = gaussian((200, 72))
    parts, how = encode(weight)
    with pytest.raises(IndexError):
        torch.nn.functional.embedding(torch.tensor(ids), weight)
    with pytest.raises(IndexError, match="expected ids from 0 to 199"):
        ops.embedding(torch.tensor(ids), *parts, *how)


def test_embedding_refuses_floats():
    parts, how = encode(gaussian((200, 72)))
    with pytest.raises(UsageError, match="int64 or int32"):
        ops.embedding(torch.tensor([1.0]), *parts, *how)


def test_embedding_decodes_only_blocks_that_are_needed():
    """Damage elsewhere goes unnoticed."""
    weight = gaussian((200, 72))
    parts, how = encode(weight)
    tails = parts[3].clone()
    tails[-64:] = 255
    ids = torch.tensor([3, 20])
    assert_same_bits(ops.embedding(ids, *parts[:3], tails, *how), weight[ids])


@pytest.mark.parametrize("utils", ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
def test_opcheck(utils):
    parts, how = encode(gaussian((40, 96)))
    torch.library.opcheck(ops.decode, (*parts, *how, 3, 9), test_utils=utils)
    torch.library.opcheck(ops.embedding, (torch.tensor([[1, 5], [1, 39]]), *parts, *how), test_utils=utils)
