"""Arrays that are torch tensors."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from array_helpers import BF16, gaussian, with_header
from bitforbit import errors
from bitforbit.arrays import Encoded, encode


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    names = (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "float64", "complex64", "uint16", "uint32", "uint64"),
        *("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    )
    for name, shape in itertools.product(names, [(), (0, 3), (65,), (33, 130)]):
        dtype = getattr(torch, name)
        words = torch.randint(0, 2 if name == "bool" else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensor = words.view(dtype).reshape(shape)
        if name in ("bfloat16", "float16", "float32") and shape == (33, 130):
            tensor = (torch.randn(shape) * 0.02).to(dtype)
        encoded = encode(tensor)
        assert encoded.library == "torch"
        for got in (encoded.decode(), Encoded.from_bytes(encoded.to_bytes()).decode()):
            assert isinstance(got, torch.Tensor)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        if shape == (33, 130):
            assert encoded.decode(rows=(3, 20)).shape == (17, 130)


def test_torch_views_parameters_and_out() -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.randn(64, 96).to(torch.bfloat16))
    encoded = encode(parameter.T)
    assert torch.equal(encoded.decode(), parameter.T)
    assert not encoded.decode().requires_grad
    out = torch.empty(96, 64, dtype=torch.bfloat16)
    assert encoded.decode(out) is out
    assert torch.equal(out, parameter.T)
    array = np.empty((96, 64), BF16)
    encoded.decode(array)
    assert torch.equal(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16), out)
    with pytest.raises(errors.UsageError):
        encoded.decode(torch.empty(64, 96, dtype=torch.bfloat16).T)
    conjugate = torch.randn(5, 2, dtype=torch.complex64).conj()
    assert torch.equal(encode(conjugate).decode(), conjugate)
    with pytest.raises(errors.UsageError, match="contiguous"):
        encode(conjugate).decode(torch.empty_like(conjugate).conj())


def test_torch_tensors_elsewhere() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(errors.UsageError, match="CPU memory"):
        encode(torch.empty(3, device="meta"))
    with pytest.raises(errors.UsageError, match="dense"):
        encode(torch.eye(3).to_sparse())
    with pytest.raises(errors.UnsupportedDtypeError):
        encode(torch.zeros(3, dtype=torch.complex128))


def test_a_torch_array_without_torch(tmp_path: object) -> None:
    data = with_header(encode(gaussian((16, 64))).to_bytes(), library="torch")
    code = (
        "import sys, numpy, ml_dtypes, bitforbit\n"
        "encoded = bitforbit.Encoded.from_bytes(sys.stdin.buffer.read())\n"
        "out = numpy.empty((16, 64), ml_dtypes.bfloat16)\n"
        "encoded.decode(out)\n"
        "assert 'torch' not in sys.modules\n"
        "try: encoded.decode()\n"
        "except bitforbit.errors.MissingDependencyError: sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], input=data).returncode == 7
