"""What describes a compressed parameter besides its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitforbit import dtypes
from bitforbit.codecs.base import EncodedTensor
from bitforbit.codecs.planes.layout import Layout
from bitforbit.errors import StateDictError
from bitforbit.ops.checks import PARTS, dtype_name
from bitforbit.ops.checks import layout as checked_layout

__all__ = ["PARTS", "CompressedSpec", "part_name"]


def part_name(part: str, name: str) -> str:
    """Name of the module's parameter that holds a part of its parameter ``name``, as in files: ``code__weight``."""
    return f"{part}__{name}"


@dataclass(frozen=True)
class CompressedSpec:
    """One compressed parameter: dtype and shape of the plain one, and how its parts are to be read.

    ``kind`` is the float that is coded (a safetensors name); ``rows`` and ``cols`` are those of the matrix view,
    ``rows_per_table`` is a number of rows (docs/format.md, section 3.1). Raises CorruptTensorError if these
    contradict each other, UnsupportedDtypeError.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
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
    def of_encoded(cls, encoded: EncodedTensor) -> CompressedSpec:
        """The spec of a tensor that the codec ``planes`` has encoded, or that a record describes."""
        return cls.from_record({"dtype": encoded.dtype, "shape": encoded.shape, "config": encoded.config})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CompressedSpec:
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
    def elements(self) -> int:
        """Number of elements of the plain parameter."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the plain parameter."""
        return self.elements * int(self.dtype.itemsize)

    @property
    def arguments(self) -> tuple[str, int, int, int, torch.dtype]:
        """What the operators want to know of a weight: kind, rows, cols, rows_per_table, dtype."""
        return self.kind, self.rows, self.cols, self.rows_per_table, self.dtype

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether parts of these lengths in bytes can be this parameter's."""
        layout = checked_layout(self.kind, self.rows, self.cols, self.rows_per_table, self.dtype)
        return dict(sizes) == layout.part_bytes(sizes.get("tails", 0))
