"""From layout to layout, kernels emulated: the same bytes as the CPU's encoder and the plain packer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitforbit import ops, tensors
from bitforbit.codecs.df11.encode import encode_unit
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.cuda.tiles import naive
from bitforbit.errors import Df11FormatError, UsageError
from bitforbit.ops.gpu.queues import in_graph_tree
from helpers.gpu_weights import words
from torch_helpers import KINDS, assert_same_bits, encode, gaussian, random_bits

SHAPES = [(64, 256), (100, 300), (257, 65)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("emulated")
def test_planes_to_tiles_and_back(shape):
    weight = gaussian(shape)
    parts, how = encode(weight)
    packed = ops.gpu.planes_to_tiles(parts, *how)
    if packed is None:
        assert ops.gpu.pack_tiles(weight) is None
        packed = {name: torch.from_numpy(part.copy()) for name, part in naive.pack(words(weight)).items()}
    else:
        for (name, got), (wanted, expected) in zip(packed.items(), naive.pack(words(weight)).items(), strict=True):
            assert name == wanted
            assert_same_bits(got, torch.from_numpy(expected.copy()))
    rows_per_table, back = ops.gpu.tiles_to_planes(tuple(packed.values()), *shape)
    assert rows_per_table == how[3]
    assert list(back) == ["code", "digits", "sign_mantissa", "tails"]
    for got, expected in zip(back.values(), parts, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.usefixtures("emulated")
def test_what_tiles_do_not_hold():
    for dtype in (torch.float8_e5m2, torch.float32):
        parts, how = encode(gaussian((64, 256), dtype))
        assert ops.gpu.planes_to_tiles(parts, *how) is None
    parts, how = encode(gaussian((64, 256)).float(), "BF16")
    assert ops.gpu.planes_to_tiles(parts, *how) is None
    assert ops.gpu.pack_tiles(random_bits((64, 256), torch.bfloat16)) is None
    for wrong in (gaussian((64, 256), torch.float32), gaussian((64,)), gaussian((0, 64))):
        with pytest.raises(UsageError, match="expected a matrix that is not empty, of a dtype among"):
            ops.gpu.pack_tiles(wrong)


@pytest.mark.usefixtures("emulated")
def test_strided_matrices_are_packed():
    weight = gaussian((256, 128)).t()
    packed = ops.gpu.pack_tiles(weight)
    assert packed is not None
    assert_same_bits(ops.tiles_decode(*packed.values(), 128, 256, 0, 128), weight.contiguous())


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(100, 72), (20, 3, 5, 7), (70001,)])
@pytest.mark.usefixtures("emulated")
def test_encode_planes_as_on_a_cpu(dtype, shape):
    check_encoding(gaussian(shape, dtype))


@pytest.mark.usefixtures("emulated")
def test_encode_planes_of_special_tensors():
    check_encoding(gaussian((64, 96)).float())  # widened BF16
    check_encoding(torch.zeros(64, 96, dtype=torch.bfloat16))
    check_encoding(random_bits((64, 96), torch.bfloat16))  # does not get smaller
    check_encoding(gaussian((96, 64)).t())
    check_encoding(gaussian((5,)))
    assert ops.gpu.encode_planes(torch.arange(1000)) is None
    assert ops.gpu.encode_planes(torch.zeros(0, 5, dtype=torch.bfloat16)) is None


def check_encoding(tensor: torch.Tensor) -> None:
    data, dtype, shape = tensors.to_bytes(tensor)
    expected = PlanesCodec().encode(data, dtype, shape, 1)
    got = ops.gpu.encode_planes(tensor)
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert (got.codec, got.codec_version, got.dtype, got.shape, got.config) == (
            expected.codec, expected.codec_version, expected.dtype, expected.shape, expected.config
        )  # fmt: skip
        for name, part in expected.parts.items():
            assert_same_bits(got.parts[name], torch.from_numpy(part))


def test_df11_units_are_prepared_without_a_gpu():
    unit = encode_unit([words(gaussian((40, 50)))])
    arrays = {name: array for name, array in unit.tensors().items() if name != "split_positions"}
    for given in (unit, arrays):
        geometry, parts = ops.gpu.df11_prepare(given, torch.device("cpu"))
        assert geometry.elements == 2000
        assert list(parts) == ["tables", "stream", "sign_mantissa", "index"]
        assert all(part.dtype == torch.uint8 and part.dim() == 1 for part in parts.values())
    broken = {**arrays, "output_positions": np.flip(arrays["output_positions"]).copy()}
    with pytest.raises(Df11FormatError):
        ops.gpu.df11_prepare(broken, torch.device("cpu"))


def test_graphs_of_inductor_are_recognized_without_any():
    import torch._inductor.cudagraph_trees

    assert not in_graph_tree(torch.device("cpu"))
    assert not in_graph_tree(torch.device("cuda", 0))
