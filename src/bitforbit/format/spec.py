"""Names and limits of the container format (docs/format.md, sections 1, 2 and 4)."""

from __future__ import annotations

FORMAT_VERSION = 1

MANIFEST_NAME = "bitforbit.json"
RECORD_KEY = "bitforbit"
RECORD_CHECKSUM_KEY = "bitforbit_xxh3"
QUANT_METHOD = "bitforbit"
RAW_CODEC = "raw"
SHARD_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

HEADER_ALIGNMENT = 64
"""The data of a shard begins at a multiple of this many bytes of the file."""

PART_ALIGNMENT = 64
"""Every part of a compressed tensor is a multiple of this many bytes long."""

LENGTH_BYTES = 8
"""Bytes of the little-endian header length at the start of a safetensors file."""

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format for the JSON header; also the limit for a rewritten file's original."""

MAX_MANIFEST_BYTES = 1 << 30
"""A manifest larger than this is refused before it is read."""

MAX_REWRITTEN_BYTES = 4 * MAX_HEADER_BYTES
"""Original bytes of all rewritten files of a manifest together: it is not inflated if it promises more."""

MAX_EXPANSION = 1024
"""A shard whose record promises an original more than this many times larger is refused: no codec reaches it."""


def part_name(tensor: str, part: str) -> str:
    """Stored name of one part: ``a.b.weight``, ``code`` -> ``a.b.code__weight`` (section 1)."""
    head, dot, tail = tensor.rpartition(".")
    return f"{head}{dot}{part}__{tail}"


def round_up(nbytes: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``nbytes``."""
    return -(-nbytes // multiple) * multiple
