"""torch operators on compressed weights in ``torch.ops.bitforbit``: ``decode``, ``embedding``, ``linear``.

For weights in the layouts of GPUs they are called ``tiles_decode``, ..., ``df11_linear``; :mod:`bitforbit.ops.gpu` has
what else there is for GPUs.
They work under autograd, autocast, ``torch.compile`` and on meta tensors. Here are their overloads, which are called
with less overhead than the packets in ``torch.ops``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bitforbit.cpu import threads as _threads
from bitforbit.ops import autocast as _autocast
from bitforbit.ops import autograd as _autograd
from bitforbit.ops import cpu_impl as _cpu_impl
from bitforbit.ops import gpu as gpu
from bitforbit.ops import schema as _schema
from bitforbit.ops.checks import empty
from bitforbit.ops.cpu_impl import decode_into
from bitforbit.ops.schema import MODES

_schema.define()
_cpu_impl.register()
gpu.register()
_autograd.register()
_autocast.register()
# Our kernels run between torch's, whose idle threads spin.
_threads.share_openmp_threads(prefer=str(Path(torch.__file__).parent))

decode = torch.ops.bitforbit.decode.default
embedding = torch.ops.bitforbit.embedding.default
linear = torch.ops.bitforbit.linear.default
tiles_decode = torch.ops.bitforbit.tiles_decode.default
tiles_embedding = torch.ops.bitforbit.tiles_embedding.default
tiles_linear = torch.ops.bitforbit.tiles_linear.default
tiles_linears = torch.ops.bitforbit.tiles_linears.default
df11_decode = torch.ops.bitforbit.df11_decode.default
df11_embedding = torch.ops.bitforbit.df11_embedding.default
df11_linear = torch.ops.bitforbit.df11_linear.default

__all__ = [
    "MODES",
    "decode",
    "decode_into",
    "df11_decode",
    "df11_embedding",
    "df11_linear",
    "embedding",
    "empty",
    "gpu",
    "linear",
    "tiles_decode",
    "tiles_embedding",
    "tiles_linear",
    "tiles_linears",
]
