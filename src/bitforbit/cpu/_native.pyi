from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]

class CorruptData(ValueError): ...  # noqa: N818

def implementations() -> list[tuple[str, bool]]: ...
def empty_aligned(size: int) -> _Bytes: ...
def is_widened_bf16(src: _Bytes) -> bool: ...
def exponent_histogram(src: _Bytes, kind: str, wide: bool) -> Sequence[int]: ...
def planes_encode(
    src: _Bytes, kind: str, wide: bool, rows: int, cols: int, rows_per_table: int, isa: str, threads: int
) -> tuple[int, _Bytes, _Bytes, _Bytes, _Bytes]: ...
def planes_decode(
    code: _Bytes,
    digits: _Bytes,
    sign_mantissa: _Bytes,
    tails: _Bytes,
    kind: str,
    wide: bool,
    rows: int,
    cols: int,
    rows_per_table: int,
    begin: int,
    end: int,
    out: _Bytes,
    isa: str,
    threads: int,
) -> None: ...
