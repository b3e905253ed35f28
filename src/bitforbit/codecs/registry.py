"""The codecs that this version can read, by name."""

from __future__ import annotations

from bitforbit.codecs.base import Codec
from bitforbit.codecs.planes import PlanesCodec
from bitforbit.errors import UnsupportedVersionError

_CODECS: dict[str, Codec] = {codec.name: codec for codec in (PlanesCodec(),)}


def names() -> tuple[str, ...]:
    """Names of all known codecs."""
    return tuple(_CODECS)


def get(name: str, version: int) -> Codec:
    """The codec of that name, able to decode that version. Raises UnsupportedVersionError."""
    codec = _CODECS.get(name)
    if codec is None:
        raise UnsupportedVersionError(
            f"expected a codec among {', '.join(_CODECS)}, got {name!r}; a newer bitforbit may know it: "
            "pip install --upgrade bitforbit"
        )
    if not 1 <= version <= codec.version:
        raise UnsupportedVersionError(
            f"expected codec {name!r} version 1 to {codec.version}, got {version}; pip install --upgrade bitforbit"
        )
    return codec
