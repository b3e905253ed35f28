"""The choice of code tables by histograms that were counted elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from bitforbit.cpu import planes


@pytest.mark.parametrize("rows_per_table", [0, 16, 128])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (70, 100), (200, 1000), (65, 40000)])
def test_choice_by_the_plan_is_that_of_the_encoder(rows: int, cols: int, rows_per_table: int) -> None:
    rng = np.random.default_rng(rows)
    words = (np.clip(120 - rng.geometric(0.3, (rows, cols)), 0, 255) << 7).astype("<u2")
    plan = planes.plan_histograms(rows, cols, rows_per_table)
    assert plan.count == -(-rows // plan.rows)
    counts = np.zeros((plan.count, 256), np.uint32)
    for row in range(rows):
        stride = plan.stride if row // plan.rows + 1 < plan.count else plan.last_stride
        counted = np.arange(cols) // 64 % stride == row % stride
        counts[row // plan.rows] += np.bincount(words[row, counted] >> 7, minlength=256).astype(np.uint32)
    chosen, tables = planes.choose_tables(counts, rows, cols, rows_per_table)
    expected, parts = planes.encode(words.reshape(-1).view(np.uint8), "BF16", False, rows, cols, rows_per_table, 1)
    assert chosen == expected
    np.testing.assert_array_equal(tables, parts["code"][: tables.nbytes])


def test_wrong_number_of_histograms() -> None:
    with pytest.raises(ValueError, match="size mismatch"):
        planes.choose_tables(np.zeros((2, 256), np.uint32), 16, 64, 0)
