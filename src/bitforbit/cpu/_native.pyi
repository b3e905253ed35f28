from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

class CorruptData(ValueError): ...  # noqa: N818

def implementations() -> list[tuple[str, bool]]: ...
def empty_aligned(size: int) -> _Bytes: ...
def is_widened_bf16(src: _Bytes) -> bool: ...
def exponent_histogram(src: _Bytes, kind: str, wide: bool) -> Sequence[int]: ...
def planes_plan_histograms(rows: int, cols: int, rows_per_table: int) -> tuple[int, int, int, int]: ...
def planes_choose_tables(
    counts: npt.NDArray[np.uint32], rows: int, cols: int, rows_per_table: int
) -> tuple[int, _Bytes]: ...
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
def df11_split_and_count(
    words: npt.NDArray[np.uint16],
    chunk_elements: int,
    threads: int,
    sign_mantissa: _Bytes,
    histograms: npt.NDArray[np.uint32],
) -> None: ...
def df11_encode(
    words: npt.NDArray[np.uint16],
    chunk_elements: int,
    chunk_bits: npt.NDArray[np.uint64],
    first_element: int,
    codes: npt.NDArray[np.uint32],
    lengths: _Bytes,
    threads: int,
    windows: npt.NDArray[np.uint64],
    gaps: _Bytes,
    positions: npt.NDArray[np.uint32],
) -> None: ...
def df11_pack_gaps(gaps: _Bytes, packed: _Bytes) -> None: ...
def df11_decode(
    luts: _Bytes,
    encoded: _Bytes,
    sign_mantissa: _Bytes,
    positions: npt.NDArray[np.uint32],
    gaps: _Bytes,
    threads: int,
    words: npt.NDArray[np.uint16],
) -> None: ...
def linear_families() -> list[str]: ...
def linear_implementation(family: str, isa: str, f32: bool) -> str: ...
def linear(
    code: _Bytes,
    digits: _Bytes,
    sign_mantissa: _Bytes,
    tails: _Bytes,
    rows: int,
    cols: int,
    rows_per_table: int,
    x: _Bytes,
    x_f32: bool,
    out: _Bytes,
    bias: _Bytes | None,
    bias_f32: bool,
    family: str,
    k_block: int,
    isa: str,
    threads: int,
) -> None: ...
def linear_dense(
    weight: _Bytes,
    rows: int,
    cols: int,
    x: _Bytes,
    x_f32: bool,
    out: _Bytes,
    bias: _Bytes | None,
    bias_f32: bool,
    family: str,
    k_block: int,
    isa: str,
    threads: int,
) -> None: ...
def tiled_attention_implementation(isa: str) -> str: ...
def tiled_attention(
    q: _Floats, k: _Floats, v: _Floats, out: _Floats, scaling: float, square: bool, rows: int, isa: str, threads: int
) -> None: ...

class KvCache:
    def __init__(
        self,
        dtype: str,
        bits: tuple[int, int],
        head_dim: int,
        groups: tuple[int, int],
        rows: tuple[int, int],
        tokens: tuple[int, int, int],
        segments: list[int],
        exact: tuple[int, int, int, int, int],
        slots: int,
    ) -> None: ...

def kv_implementation(isa: str, dtype: str) -> str: ...
def kv_flush(
    cache: KvCache,
    new_tokens: int,
    pending_k: int,
    pending_v: int,
    k_strides: tuple[int, int, int],
    v_strides: tuple[int, int, int],
    isa: str,
    threads: int,
) -> int: ...
def kv_attend(
    cache: KvCache,
    visible: int,
    q: int,
    q_strides: tuple[int, int, int],
    queries_per_head: int,
    query_rows: int,
    scaling: float,
    softcap: float,
    sinks: int,
    mask: int,
    mask_strides: tuple[int, int, int],
    out: int,
    out_f32: bool,
    lse: int,
    isa: str,
    threads: int,
) -> None: ...
def use_parallel_region(address: int) -> None: ...
