"""What describes a compressed parameter besides its parts: one class per layout.

``planes`` is the layout of the files and of CPU memory (:class:`PlanesSpec`). Those for GPU memory are private and in
:mod:`bitforbit.nn.gpu_specs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitforbit import dtypes, ops
from bitforbit.codecs.base import EncodedTensor
from bitforbit.codecs.planes.layout import Layout
from bitforbit.errors import StateDictError
from bitforbit.ops import direct
from bitforbit.ops.checks import PARTS, dtype_name
from bitforbit.ops.checks import layout as checked_layout
from bitforbit.ops.gpu.convert import EncodedOnDevice

__all__ = ["PARTS", "CompressedSpec", "PlanesSpec", "part_name"]

Parts = Sequence[torch.Tensor]
Parameters = Mapping[str, torch.Tensor]


def part_name(part: str, name: str) -> str:
    """Name of the module's parameter that holds a part of its parameter ``name``, as in files: ``code__weight``."""
    return f"{part}__{name}"


@dataclass(frozen=True)
class CompressedSpec:
    """One compressed parameter: dtype and shape of the plain one, and how its parts are to be read.

    Parts are uint8 tensors ``[nbytes]``, four of them, in the order of ``part_names``. ``rows`` and ``cols`` are those
    of the parameter's matrix view.
    """

    layout: ClassVar[str]
    """Name of the layout."""
    part_names: ClassVar[tuple[str, ...]]

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements of the plain parameter."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the plain parameter."""
        return self.elements * int(self.dtype.itemsize)

    @property
    def coded_elements(self) -> int:
        """Number of elements that the parts hold: more than this parameter's where others share the parts."""
        return self.elements

    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix view."""
        raise NotImplementedError

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether parts of these lengths in bytes can be this parameter's."""
        raise NotImplementedError

    def decode(self, parts: Parts, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the matrix view, on the device of the parts. Raises CorruptTensorError on a CPU."""
        raise NotImplementedError

    def decode_into(self, out: torch.Tensor, parts: Parts, begin: int) -> None:
        """Rows from ``begin`` on into a contiguous tensor ``[rows, cols]``."""
        out.copy_(self.decode(parts, begin, begin + len(out)))

    def linear(self, x: torch.Tensor, own: Parameters, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
        """``x @ weight.T + bias``, for the parameter ``weight`` of a module whose parameters are given."""
        raise NotImplementedError

    def embedding(self, ids: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Rows by number, ``[*ids.shape, cols]``."""
        raise NotImplementedError


@dataclass(frozen=True)
class PlanesSpec(CompressedSpec):
    """A parameter in the layout of the files.

    ``kind`` is the float that is coded (a safetensors name); ``rows_per_table`` is a number of rows (docs/format.md,
    section 3.1). Raises CorruptTensorError if these contradict each other, UnsupportedDtypeError.
    """

    layout = "planes"
    part_names = PARTS

    kind: str
    rows: int
    cols: int
    rows_per_table: int

    def __post_init__(self) -> None:
        config: dict[str, int | str] = {
            "kind": self.kind, "rows": self.rows, "cols": self.cols, "rows_per_table": self.rows_per_table
        }  # fmt: skip
        Layout.from_config(config, dtype_name(self.dtype), tuple(self.shape))

    @classmethod
    def of_encoded(cls, encoded: EncodedTensor | EncodedOnDevice) -> PlanesSpec:
        """The spec of a tensor that the codec ``planes`` has encoded, or that a record describes."""
        return cls.from_record({"dtype": encoded.dtype, "shape": encoded.shape, "config": encoded.config})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PlanesSpec:
        """Inverse of :meth:`to_record`; also reads a tensor's entry in a shard's record (docs/format.md, section 2).

        Raises StateDictError if members are missing, CorruptTensorError.
        """
        names = {name: torch_name for torch_name, name in dtypes.ARRAY_NAMES.items()}
        try:
            config = record["config"]
            dtype = getattr(torch, names[record["dtype"]])
            shape = tuple(int(n) for n in record["shape"])
            return cls(dtype, shape, config["kind"], config["rows"], config["cols"], config["rows_per_table"])
        except (KeyError, TypeError, AttributeError) as error:
            raise StateDictError(
                f"expected dtype, shape and config of a compressed parameter, got {record!r} ({error!r})"
            ) from None

    def to_record(self) -> dict[str, Any]:
        """JSON-able description, with the members that a shard's record has."""
        config = {"kind": self.kind, "rows": self.rows, "cols": self.cols, "rows_per_table": self.rows_per_table}
        return {"dtype": dtype_name(self.dtype), "shape": list(self.shape), "config": config}

    @property
    def arguments(self) -> tuple[str, int, int, int, torch.dtype]:
        """What the operators want to know of a weight: kind, rows, cols, rows_per_table, dtype."""
        return self.kind, self.rows, self.cols, self.rows_per_table, self.dtype

    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix view."""
        return self.rows, self.cols

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether parts of these lengths in bytes can be this parameter's."""
        layout = checked_layout(self.kind, self.rows, self.cols, self.rows_per_table, self.dtype)
        return dict(sizes) == layout.part_bytes(sizes.get("tails", 0))

    def decode(self, parts: Parts, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the matrix view."""
        rows: torch.Tensor = ops.decode(*parts, *self.arguments, begin, end)
        return rows

    def decode_into(self, out: torch.Tensor, parts: Parts, begin: int) -> None:
        """Rows from ``begin`` on into a contiguous tensor ``[rows, cols]``."""
        if out.is_cpu:
            ops.decode_into(out, tuple(parts), self.arguments, begin)
        else:
            super().decode_into(out, parts, begin)

    def linear(self, x: torch.Tensor, own: Parameters, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
        """``x @ weight.T + bias``."""
        return direct.linear(
            x, own["code__weight"], own["digits__weight"], own["sign_mantissa__weight"], own["tails__weight"], bias,
            self.kind, self.rows, self.cols, self.rows_per_table, self.dtype, mode,
        )  # fmt: skip

    def embedding(self, ids: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Rows by number."""
        code, digits, sign_mantissa, tails = parts
        return direct.embedding(
            ids, code, digits, sign_mantissa, tails, self.kind, self.rows, self.cols, self.rows_per_table, self.dtype
        )
