"""How a model is loaded: what users pass as ``quantization_config``."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bitforbit.codecs import registry
from bitforbit.errors import UnsupportedVersionError, UsageError
from bitforbit.format.spec import FORMAT_VERSION, QUANT_METHOD

MODES = ("exact", "fused")
RUNTIMES = ("auto", "planes", "tiles", "df11")
_CODEC = "planes"
_MEMBERS = (
    "quant_method", "mode", "modules_to_not_convert", "verify", "threads", "format_version", "codec", "base",
)  # fmt: skip


class BitforbitConfig(QuantizationConfigMixin):
    """Options of a compressed model in memory.

    mode: ``"exact"``, outputs bit-identical to the uncompressed model, or ``"fused"``, exact weights multiplied by our
    own kernel in an order of summation of its own. runtime: the layout of the weights in memory, which changes no bit
    of the outputs: ``"auto"``, tiles on a GPU and planes elsewhere; ``"planes"``, that of the files, everywhere;
    ``"tiles"``, as auto, but only with a GPU; ``"df11"``, the layout of a DFloat11 checkpoint as it is, all of it on
    GPUs. compile: let ``generate`` compile the model on a GPU, as it does with plain ones and a static cache.
    modules_to_not_convert: modules whose parameters stay as they are,
    each a name or a run of components of one, with ``*`` (``"lm_head"``, ``"layers.0"``). verify: check the checksum of
    every compressed tensor that is loaded. threads: for compression while loading; default ``BITFORBIT_THREADS``, else
    all CPUs.

    The other arguments are those that a compressed directory's ``config.json`` holds.

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
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        base = kwargs.pop("base", None)
        if kwargs:
            known = "mode, runtime, compile, modules_to_not_convert, verify and threads"
            raise UsageError(f"expected options among {known}, got {', '.join(sorted(kwargs))}")
        if mode not in MODES:
            raise UsageError(f"expected mode to be one of {', '.join(MODES)}, got {mode!r}")
        if runtime not in RUNTIMES:
            raise UsageError(f"expected runtime to be one of {', '.join(RUNTIMES)}, got {runtime!r}")
        if isinstance(modules_to_not_convert, str):
            raise UsageError("expected modules_to_not_convert to be a list of names, got a string")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise UsageError(f"expected threads to be a positive number, got {threads!r}")
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
        self.quant_method = QUANT_METHOD
        self.mode = mode
        self.runtime = runtime
        self.compile = compile
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.verify = verify
        self.threads = threads
        self.format_version = format_version
        self.codec = codec

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From ``config.json``: like the constructor, but members that this release does not know are ignored."""
        known = {key: value for key, value in config_dict.items() if key in _MEMBERS}
        return super().from_dict(known, return_unused_kwargs, **kwargs)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an explicit ``quantization_config`` changes of a compressed directory's own."""
        return {
            "mode": self.mode,
            "runtime": self.runtime,
            "compile": self.compile,
            "modules_to_not_convert": self.modules_to_not_convert,
            "verify": self.verify,
            "threads": self.threads,
        }

    def keeps(self, module: str) -> bool:
        """Whether the parameters of a module, by its full name, stay as they are."""
        return any(fnmatchcase(f".{module}.", f"*.{name}.*") for name in self.modules_to_not_convert)
