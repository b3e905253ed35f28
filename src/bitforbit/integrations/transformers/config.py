"""How a model is loaded: what users pass as ``quantization_config``."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bitforbit.integrations.options import Options, known_members


class BitforbitConfig(Options, QuantizationConfigMixin):
    """Options of a compressed model in memory.

    mode: ``"exact"``, outputs bit-identical to the uncompressed model, or ``"fused"``, exact weights multiplied by our
    own kernel in an order of summation of its own. runtime: the layout of the weights in memory, which changes no bit
    of the outputs: ``"auto"``, tiles on a GPU and planes elsewhere; ``"planes"``, that of the files, everywhere;
    ``"tiles"``, as auto, but only with a GPU; ``"df11"``, the layout of a DFloat11 checkpoint as it is, all of it on
    GPUs. compile: let ``generate`` compile the model on a GPU, as it does with plain ones and a static cache.
    modules_to_not_convert: modules whose parameters stay as they are,
    each a name or a run of components of one, with ``*`` (``"lm_head"``, ``"layers.0"``). verify: check the checksum of
    every compressed tensor that is loaded. threads: for compression while loading; default ``BITFORBIT_THREADS``, else
    all CPUs. ahead: of blocks that a device map puts beside the device that computes (``"cpu"``, ``"disk"``), how many
    are on their way while one runs; there is memory for one more. None: accelerate's hooks fetch each module's tensors
    when it runs.

    The other arguments are those that a compressed directory's ``config.json`` holds.

    Raises UsageError for values out of range, UnsupportedVersionError for a format or codec of a newer release.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From ``config.json``: like the constructor, but members that this release does not know are ignored."""
        return super().from_dict(known_members(config_dict), return_unused_kwargs, **kwargs)
