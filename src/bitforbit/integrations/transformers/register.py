"""Makes transformers know the quantization method. Importing this module does it; importing it again does nothing.

It may run while ``transformers.quantizers`` is only half imported, so nothing here, nor in what it imports, may import
``transformers.core_model_loading`` or ``transformers.modeling_utils``.
"""

from __future__ import annotations

from transformers.quantizers import auto

from bitforbit.format.spec import QUANT_METHOD
from bitforbit.integrations.transformers.config import BitforbitConfig
from bitforbit.integrations.transformers.quantizer import BitforbitQuantizer

if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(QUANT_METHOD)(BitforbitConfig)
    auto.register_quantizer(QUANT_METHOD)(BitforbitQuantizer)
    # There is no register function for classes whose loading attributes override those of config.json.
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, BitforbitConfig)
