"""The native codec: exponents as 2-bit digit planes, sign and mantissa as they are (docs/format.md, section 3)."""

from bitforbit.codecs.planes.codec import PlanesCodec

__all__ = ["PlanesCodec"]
