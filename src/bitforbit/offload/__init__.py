"""Models that do not fit the device: blocks wait, compressed, in host memory or files, and arrive as they run.

:mod:`image`: the tensors of a block side by side. :mod:`stores`: where images wait. :mod:`movers`: copies to the
device. :mod:`ring`: what is fetched when. :mod:`modules`: parameters in and out of modules. :mod:`stream`: all of it.
"""

from __future__ import annotations

from bitforbit.offload.files import file_ranges
from bitforbit.offload.image import FileRange
from bitforbit.offload.ring import slot_sizes
from bitforbit.offload.stream import AHEAD, Stream, stream_blocks

__all__ = ["AHEAD", "FileRange", "Stream", "file_ranges", "slot_sizes", "stream_blocks"]
