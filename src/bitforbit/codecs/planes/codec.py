"""The ``planes`` codec behind the common codec interface, on the native kernels."""

from __future__ import annotations

from collections.abc import Mapping

from bitforbit import dtypes
from bitforbit.codecs.base import Bytes, EncodedTensor, Fetch
from bitforbit.codecs.planes.layout import BLOCK_ROWS, GROUP, PLANE_WIDTHS, Layout, matrix_view
from bitforbit.codecs.planes.rows import PlanesRowReader
from bitforbit.cpu import planes as kernels
from bitforbit.errors import CorruptTensorError, UsageError

# What a compressed tensor costs besides its parts: its entry in the header and in the record.
RECORD_BYTES = 512


class PlanesCodec:
    """Codec ``planes``, version 1."""

    name = "planes"
    version = 1
    part_names: tuple[str, ...] = ("code", "digits", "sign_mantissa", "tails")

    def encode(self, data: Bytes, dtype: str, shape: tuple[int, ...], threads: int) -> EncodedTensor | None:
        """Encode a float tensor; None if it is no float of a known kind, or would not become smaller.

        F32 whose low 16 bits are all zero (a widened BF16) is coded as BF16.
        """
        if dtype not in PLANE_WIDTHS or data.nbytes <= RECORD_BYTES:
            return None
        rows, cols = matrix_view(shape)
        if min(rows, BLOCK_ROWS) * (cols + GROUP) >= 1 << 32:
            return None  # more positions in a block than its counts can state
        wide = dtype == "F32" and kernels.is_widened_bf16(data)
        encoded = self.encode_always(data, dtype, shape, "BF16" if wide else dtype, threads)
        return encoded if encoded.nbytes + RECORD_BYTES < data.nbytes else None

    def encode_always(
        self, data: Bytes, dtype: str, shape: tuple[int, ...], kind: str, threads: int, rows_per_table: int = 0
    ) -> EncodedTensor:
        """Encode a non-empty float tensor as that kind even where it does not pay."""
        rows, cols = matrix_view(shape)
        wide = kind != dtype
        rows_per_table, parts = kernels.encode(data, kind, wide, rows, cols, rows_per_table, threads)
        config: dict[str, int | str] = {"kind": kind, "rows": rows, "cols": cols, "rows_per_table": rows_per_table}
        return EncodedTensor(self.name, self.version, dtype, shape, config, parts)

    def check(
        self, dtype: str, shape: tuple[int, ...], config: Mapping[str, int | str], sizes: Mapping[str, int]
    ) -> None:
        """See :class:`bitforbit.codecs.base.Codec`."""
        self._layout(dtype, shape, config, sizes)

    def _layout(
        self, dtype: str, shape: tuple[int, ...], config: Mapping[str, int | str], sizes: Mapping[str, int]
    ) -> Layout:
        if set(sizes) != set(self.part_names):
            raise CorruptTensorError(f"expected parts {', '.join(self.part_names)}, got {', '.join(sizes) or 'none'}")
        layout = Layout.from_config(config, dtype, shape)
        expected = layout.part_bytes(sizes["tails"])
        if sizes != expected:
            raise CorruptTensorError(f"expected parts of {expected} bytes, got {dict(sizes)}")
        return layout

    def decode(self, tensor: EncodedTensor, out: Bytes, rows: tuple[int, int] | None, threads: int) -> None:
        """See :class:`bitforbit.codecs.base.Codec`."""
        sizes = {name: part.nbytes for name, part in tensor.parts.items()}
        layout = self._layout(tensor.dtype, tensor.shape, tensor.config, sizes)
        begin, end = rows or (0, layout.rows)
        if not 0 <= begin <= end <= layout.rows:
            raise UsageError(f"expected a range of rows within 0 to {layout.rows}, got {begin} to {end}")
        nbytes = (end - begin) * layout.cols * dtypes.bits(tensor.dtype) // 8
        if out.nbytes != nbytes:
            raise UsageError(f"expected an output of {nbytes} bytes, got {out.nbytes}")
        geometry = (layout.rows, layout.cols, layout.rows_per_table)
        kernels.decode(
            dict(tensor.parts), layout.kind, layout.kind != tensor.dtype, geometry, (begin, end), out, threads
        )

    def row_reader(
        self,
        dtype: str,
        shape: tuple[int, ...],
        config: Mapping[str, int | str],
        sizes: Mapping[str, int],
        fetch: Fetch,
        end: int,
    ) -> PlanesRowReader:
        """See :class:`bitforbit.codecs.base.Codec`."""
        layout = self._layout(dtype, shape, config, sizes)
        return PlanesRowReader(layout, dtype, sizes["tails"], fetch, -(-end // layout.cols))
