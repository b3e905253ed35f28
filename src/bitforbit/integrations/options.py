"""What users can choose of a compressed model, in whichever library it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from bitforbit.codecs import registry
from bitforbit.errors import UnsupportedVersionError, UsageError
from bitforbit.format.spec import FORMAT_VERSION, QUANT_METHOD

MODES = ("exact", "fused")
RUNTIMES = ("auto", "planes", "tiles", "df11")
AHEAD = 2
"""Blocks on their way while one runs, of those that do not fit the device."""
_CODEC = "planes"
_MEMBERS = (
    "quant_method", "mode", "modules_to_not_convert", "verify", "threads", "format_version", "codec", "base",
)  # fmt: skip


class Method(StrEnum):
    """The quantization method: transformers wants a string, diffusers something that has a ``value``."""

    BITFORBIT = QUANT_METHOD


class Options:
    """The options themselves; the libraries' classes for them are derived from this one and from a class of theirs.

    Raises UsageError for values out of range, UnsupportedVersionError for a format or codec of a newer release.
    """

    def __init__(
        self,
        mode: str = "exact",
        modules_to_not_convert: Sequence[str] | None = None,
        verify: bool = True,
        threads: int | None = None,
        runtime: str = "auto",
        compile: bool = False,
        format_version: int = FORMAT_VERSION,
        codec: str = _CODEC,
        ahead: int | None = AHEAD,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        base = kwargs.pop("base", None)
        if kwargs:
            known = "mode, runtime, compile, modules_to_not_convert, verify, threads and ahead"
            raise UsageError(f"expected options among {known}, got {', '.join(sorted(kwargs))}")
        if mode not in MODES:
            raise UsageError(f"expected mode to be one of {', '.join(MODES)}, got {mode!r}")
        if runtime not in RUNTIMES:
            raise UsageError(f"expected runtime to be one of {', '.join(RUNTIMES)}, got {runtime!r}")
        if isinstance(modules_to_not_convert, str):
            raise UsageError("expected modules_to_not_convert to be a list of names, got a string")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise UsageError(f"expected threads to be a positive number, got {threads!r}")
        if ahead is not None and (isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 0):
            raise UsageError(f"expected ahead to be a number of blocks of at least 0, or None, got {ahead!r}")
        if format_version != FORMAT_VERSION:
            raise UnsupportedVersionError(
                f"config.json: expected format_version {FORMAT_VERSION}, got {format_version!r}; "
                "pip install --upgrade bitforbit"
            )
        registry.get(codec, 1)
        if base is not None:
            method = base.get("quant_method") if isinstance(base, dict) else base
            raise UsageError(
                f"this model was quantized ({method}) before it was compressed, and only plain models run compressed; "
                "decompress it (bitforbit decompress) and load the result"
            )
        self.quant_method = Method.BITFORBIT
        self.mode = mode
        self.runtime = runtime
        self.compile = compile
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.verify = verify
        self.threads = threads
        self.format_version = format_version
        self.codec = codec
        self.ahead = ahead

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an explicit ``quantization_config`` changes of a compressed directory's own."""
        return {
            "mode": self.mode,
            "runtime": self.runtime,
            "compile": self.compile,
            "modules_to_not_convert": self.modules_to_not_convert,
            "verify": self.verify,
            "threads": self.threads,
            "ahead": self.ahead,
        }

    def keeps(self, module: str) -> bool:
        """Whether the parameters of a module, by its full name, stay as they are."""
        return any(fnmatchcase(f".{module}.", f"*.{name}.*") for name in self.modules_to_not_convert)


def known_members(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a ``quantization_config`` in a ``config.json``, the members that this release knows."""
    return {key: value for key, value in config.items() if key in _MEMBERS}
