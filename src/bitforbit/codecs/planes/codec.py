"""The ``planes`` codec behind the common codec interface."""

from __future__ import annotations

from bitforbit.codecs.base import Bytes, EncodedTensor


class PlanesCodec:
    """Codec ``planes``, version 1."""

    name = "planes"
    version = 1
    part_names = ("code", "digits", "sign_mantissa", "tails")

    def encode(self, data: Bytes, dtype: str, shape: tuple[int, ...], threads: int) -> EncodedTensor | None:
        """See :class:`bitforbit.codecs.base.Codec`."""
        raise NotImplementedError

    def decode(self, tensor: EncodedTensor, out: Bytes, rows: tuple[int, int] | None, threads: int) -> None:
        """See :class:`bitforbit.codecs.base.Codec`."""
        raise NotImplementedError
