"""DF11 decoder: the six arrays of a unit back to BF16 words. Trusts nothing in them."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.df11.codebook import validate_luts
from bitforbit.codecs.df11.unit import BLOCK_BYTES, GAP_BYTES_PER_BLOCK, MAX_STREAM_BYTES, MAX_WEIGHTS, Df11Unit
from bitforbit.cpu import df11 as native
from bitforbit.errors import Df11FormatError, Df11PositionsError, UsageError


def decode_unit(
    unit: Df11Unit, *, out: npt.NDArray[np.uint16] | None = None, threads: int = 1
) -> npt.NDArray[np.uint16]:
    """All weights of a unit as BF16 bit patterns ``[n]``, the matrices one after the other.

    ``out``, if given, is a contiguous uint16 array ``[n]`` that receives them. Matrix j is
    ``words[begin:end]`` for the j-th pair of :func:`matrix_bounds`.

    Raises Df11LutError, Df11PositionsError or Df11FormatError for arrays that contradict each other, UsageError for
    an ``out`` that does not fit.
    """
    positions = check_unit(unit)
    if out is None:
        out = np.empty(unit.num_weights, np.uint16)
    if out.dtype != np.uint16 or out.shape != (unit.num_weights,) or not out.flags.carray:
        raise UsageError(
            f"expected out as contiguous, writable uint16 [{unit.num_weights}], got {out.dtype} {list(out.shape)}"
        )
    native.decode(unit.luts, unit.encoded_exponent, unit.sign_mantissa, positions, unit.gaps, out, threads)
    return out


def matrix_bounds(unit: Df11Unit) -> list[tuple[int, int]]:
    """Begin and end of each matrix, in weights. Raises Df11PositionsError."""
    splits = unit.split_positions
    if splits.ndim != 1 or splits.dtype != np.int64:
        raise Df11FormatError(f"expected split_positions of int64 [m - 1], got {splits.dtype} {list(splits.shape)}")
    edges = [0, *splits.tolist(), unit.num_weights]
    bounds = list(itertools.pairwise(edges))
    if splits.size and any(begin >= end for begin, end in bounds):
        raise Df11PositionsError(
            f"expected split_positions to rise strictly between 0 and {unit.num_weights}, got {edges[1:-1][:20]}"
        )
    return bounds


def check_unit(unit: Df11Unit) -> npt.NDArray[np.uint32]:
    """Check everything about a unit but its stream; return the output positions ``[B + 1]``.

    Raises Df11LutError, Df11PositionsError or Df11FormatError.
    """
    for name in ("encoded_exponent", "sign_mantissa", "output_positions", "gaps"):
        array = getattr(unit, name)
        if array.dtype != np.uint8 or array.ndim != 1:
            raise Df11FormatError(f"expected {name} of uint8 with one dimension, got {array.dtype} {array.shape}")
    if unit.num_weights > MAX_WEIGHTS or unit.encoded_exponent.size > MAX_STREAM_BYTES:
        raise Df11FormatError(
            f"expected up to {MAX_WEIGHTS} weights in up to {MAX_STREAM_BYTES} stream bytes, got {unit.num_weights} "
            f"in {unit.encoded_exponent.size}"
        )
    if unit.gaps.size != GAP_BYTES_PER_BLOCK * unit.num_blocks:
        raise Df11FormatError(
            f"expected {GAP_BYTES_PER_BLOCK * unit.num_blocks} bytes of gaps for {unit.num_blocks} blocks of "
            f"{BLOCK_BYTES} stream bytes, got {unit.gaps.size}"
        )
    matrix_bounds(unit)
    validate_luts(unit.luts)
    return _positions(unit)


def _positions(unit: Df11Unit) -> npt.NDArray[np.uint32]:
    blocks = unit.num_blocks
    # One entry less: the last code runs into the last block and ends with a byte, so that no code starts there.
    if unit.output_positions.size != 4 * (blocks + 1) and (blocks < 2 or unit.output_positions.size != 4 * blocks):
        raise Df11PositionsError(
            f"expected {4 * (blocks + 1)} bytes of output_positions for {blocks} blocks, "
            f"got {unit.output_positions.size}"
        )
    positions = np.ascontiguousarray(unit.output_positions).view("<u4").astype(np.uint32)
    if positions[0] != 0 or positions[-1] != unit.num_weights:
        raise Df11PositionsError(
            f"expected output_positions from 0 to {unit.num_weights}, got {positions[0]} to {positions[-1]}"
        )
    steps = np.diff(positions.astype(np.int64))
    if steps.size and (steps.min() < 0 or steps.max() > 8 * BLOCK_BYTES):
        at = int(np.flatnonzero((steps < 0) | (steps > 8 * BLOCK_BYTES))[0])
        raise Df11PositionsError(
            f"expected output_positions to rise by 0 to {8 * BLOCK_BYTES} per block, got {positions[at]} then "
            f"{positions[at + 1]} in block {at}"
        )
    if positions.size == blocks:
        positions = np.append(positions, np.uint32(unit.num_weights))
    return positions
