"""Model directories: compress, decompress, verify, inspect."""

from bitforbit.archive.compress import compress
from bitforbit.archive.decompress import decompress
from bitforbit.archive.inspect import inspect
from bitforbit.archive.merge import merge
from bitforbit.archive.progress import Progress
from bitforbit.archive.report import (
    CompressReport,
    DecompressReport,
    Failure,
    InspectReport,
    TensorReport,
    VerifyReport,
)
from bitforbit.archive.verify import verify

__all__ = [
    "CompressReport",
    "DecompressReport",
    "Failure",
    "InspectReport",
    "Progress",
    "TensorReport",
    "VerifyReport",
    "compress",
    "decompress",
    "inspect",
    "merge",
    "verify",
]
