"""Quantized KV caches on a GPU: what has left the exact window is packed, and attention reads it packed.

:mod:`bitforbit.kv.layout` is the layout, :mod:`bitforbit.kv.spec` says which tokens are quantized.
"""

from bitforbit.cuda.kv.attend import attend, workspace_bytes
from bitforbit.cuda.kv.call import KvCall
from bitforbit.cuda.kv.flush import flush

__all__ = ["KvCall", "attend", "flush", "workspace_bytes"]
