"""Makes diffusers know the quantization method. Importing this module does it; importing it again does nothing.

It runs while ``diffusers.quantizers`` is only half imported, so nothing here, nor in what it imports, may import
``diffusers.models``.
"""

from __future__ import annotations

from typing import Any

from diffusers.quantizers import auto

from bitforbit.errors import UsageError
from bitforbit.format.spec import QUANT_METHOD
from bitforbit.integrations.diffusers.config import BitforbitConfig
from bitforbit.integrations.diffusers.quantizer import BitforbitQuantizer
from bitforbit.integrations.options import Options


def _merging(stock: Any) -> Any:
    """What joins the ``quantization_config`` of a checkpoint with the one that was passed.

    The stock one ignores what was passed.
    """

    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        stored, passed = quantization_config, quantization_config_from_args
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if method != QUANT_METHOD:
            if isinstance(passed, Options):
                raise UsageError(
                    f"expected an ordinary checkpoint to compress, got one that is quantized already ({method}); leave "
                    "quantization_config out"
                )
            return stock(stored, passed)
        merged = BitforbitConfig.from_dict(stored) if isinstance(stored, dict) else stored
        if isinstance(passed, Options):
            for name, value in passed.get_loading_attributes().items():
                setattr(merged, name, value)
        elif passed is not None:
            other = getattr(passed, "quant_method", None) or type(passed).__name__
            raise UsageError(
                f"expected a BitforbitConfig or none, since the checkpoint was compressed by bitforbit, got {other}; "
                "decompress the checkpoint (bitforbit decompress) to quantize it"
            )
        return merged

    return merge


if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BitforbitConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = BitforbitQuantizer
    _stock = auto.DiffusersAutoQuantizer.merge_quantization_configs
    auto.DiffusersAutoQuantizer.merge_quantization_configs = classmethod(_merging(_stock))
