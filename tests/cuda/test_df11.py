"""The DFloat11 kernels give the weights back bit for bit, on every kind of stream that the format's rules distinguish."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from df11_cases import OnDevice, assert_decodes, fibonacci, gaussian, shuffled, words_of

from bitforbit.codecs.df11 import decode_unit, encode_unit


def test_weights_of_a_model(queue: Any) -> None:
    unit = assert_decodes(queue, gaussian(50_001))
    assert unit.num_blocks > 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 31, 63, 64, 65, 500])
def test_short_units(queue: Any, size: int) -> None:
    assert_decodes(queue, shuffled(dict(zip(range(110, 122), fibonacci(12), strict=True)), seed=size)[:size])
