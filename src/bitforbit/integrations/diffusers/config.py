"""How a model is loaded: what users pass as ``quantization_config``."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from bitforbit.errors import UsageError
from bitforbit.integrations.options import Options, known_members


class BitforbitConfig(Options, QuantizationConfigMixin):
    """Options of a compressed model in memory: those of :class:`bitforbit.BitforbitConfig`.

    That class, which needs transformers, is accepted by diffusers as well. ``runtime="df11"`` is not: there is no
    reader for DFloat11 checkpoints of diffusers. ``ahead`` has no effect: what is offloaded is moved by diffusers' own
    hooks, or by :func:`bitforbit.offload.stream_blocks`, which the user calls.

    Raises UsageError for values out of range, UnsupportedVersionError for a format or codec of a newer release.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From ``config.json``: like the constructor, but members that this release does not know are ignored."""
        return super().from_dict(known_members(config_dict), return_unused_kwargs, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """All options: diffusers prints them, but its base class lacks this method."""
        options: dict[str, Any] = self.to_dict()
        return options


def check(options: Options) -> None:
    """Raise UsageError for options that mean nothing here."""
    if options.runtime == "df11":
        raise UsageError(
            "runtime='df11': DFloat11 checkpoints of diffusers cannot be read; use 'auto', 'planes' or 'tiles'"
        )
