"""torch operators on compressed weights in ``torch.ops.bitforbit``: ``decode``, ``embedding``, ``linear``.

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
from bitforbit.ops import schema as _schema
from bitforbit.ops.checks import empty
from bitforbit.ops.cpu_impl import decode_into
from bitforbit.ops.schema import MODES

_schema.define()
_cpu_impl.register()
_autograd.register()
_autocast.register()
# Our kernels run between torch's, whose idle threads spin.
_threads.share_openmp_threads(prefer=str(Path(torch.__file__).parent))

decode = torch.ops.bitforbit.decode.default
embedding = torch.ops.bitforbit.embedding.default
linear = torch.ops.bitforbit.linear.default

__all__ = ["MODES", "decode", "decode_into", "embedding", "empty", "linear"]
