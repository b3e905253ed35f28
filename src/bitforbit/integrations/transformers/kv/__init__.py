"""A quantized key-value cache for ``generate`` of transformers.

``cache`` is what is passed as ``past_key_values``; its layers hand out a ``handle`` in place of keys and values, which
``attention``, registered with transformers as ``bitforbit_kivi``, takes. ``plan`` says which layers are quantized.
Importing this package registers the attention.
"""

from __future__ import annotations

from bitforbit.integrations.transformers.kv.attention import NAME, register
from bitforbit.integrations.transformers.kv.cache import KiviCache, KiviLayer
from bitforbit.integrations.transformers.kv.figures import CacheFigures, figures
from bitforbit.integrations.transformers.kv.model import kivi_cache

__all__ = ["NAME", "CacheFigures", "KiviCache", "KiviLayer", "figures", "kivi_cache"]

register()
