"""The tuner, on made-up times, and the table that it writes: what it changes, and what it must not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused import tune, tuned
from bitforbit.cuda.fused.order import Order, choose_order, estimate_splits
from bitforbit.cuda.fused.plan import BULK, HOPPER, VARIANTS, choose_variant
from bitforbit.cuda.fused.tune import Case, Measured, orders
from bitforbit.cuda.fused.tuned import Choice
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.errors import UsageError

H200 = DeviceProperties("NVIDIA H200", (9, 0), 132, 50 << 20, 227 << 10)
A100 = DeviceProperties("NVIDIA A100-SXM4-40GB", (8, 0), 108, 40 << 20, 163 << 10)
ROWS, COLS = (1024,), 4096
ESTIMATED = estimate_splits(ROWS, COLS, H200)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where tables are looked for; what was read before is forgotten, before and after."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    caches = (tuned.load, choose_order, plans.plan, plans.workspace_bytes)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def write(folder: Path, choice: Choice, device: DeviceProperties = H200) -> None:
    text = tuned.render(device.name, device.multiprocessors, {(ROWS, COLS): choice}, commit="abc")
    (folder / tuned.file_name(device.name)).write_text(text)


def test_packaged_tables_are_of_this_version() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        device, _, table = tuned.parse(path.read_text(), path.name)
        assert path.name == tuned.file_name(device)
        for (rows, cols), choice in table.items():
            assert rows
            order = Order(cols, choice.splits or 1, instruction=choice.instruction or Order.instruction)
            known = [(v.tokens, asdict(v)) for v in plans.ALL if v.instruction == order.instruction]
            for tokens, fields in choice.variants.items():
                assert (tokens, fields) in known, (path.name, rows, fields)


def test_equal_times_leave_the_estimates() -> None:
    choice, measured = tune.tune(ROWS, COLS, H200, lambda case: 1.0)
    assert choice == Choice()
    assert {one.case.tokens for one in measured} == {8, 16, 32, 64}
    assert {one.case.variant for one in measured} == {*VARIANTS, *BULK, *HOPPER} - {HOPPER[2]}


def test_differences_within_noise_leave_the_estimates() -> None:
    assert tune.tune(ROWS, COLS, H200, lambda case: 1.0 if case.order.splits == ESTIMATED else 0.99)[0] == Choice()


def test_the_fastest_is_found() -> None:
    best = BULK[0]

    def microseconds(case: Case) -> float:
        return 10 + abs(case.order.splits - 3) - (2 if case.variant == best else 0)

    choice, _ = tune.tune(ROWS, COLS, H200, microseconds)
    assert choice == Choice(3, {8: asdict(best)})


def test_the_instruction_is_chosen_for_all_numbers_of_tokens_too(folder: Path) -> None:
    """One that wins from 32 tokens on and loses a little before."""
    first, last = HOPPER[2:4]

    def microseconds(case: Case) -> float:
        if case.order.instruction == Order.instruction:
            return 10.0
        return 11.0 if case.tokens < 32 else 8.0 if case.variant == first else 7.0

    choice, _ = tune.tune(ROWS, COLS, H200, microseconds)
    assert choice == Choice(None, {}, last.instruction)  # of two for 32 tokens the last one is the default
    write(folder, Choice(2, {32: asdict(first)}, first.instruction))
    order = choose_order(ROWS, COLS, H200)
    assert order == Order(COLS, 2, instruction=first.instruction)
    assert [plans.plan(ROWS, order, tokens, H200).variant for tokens in (1, 20)] == [HOPPER[0], first]
    assert plans.plan(ROWS, Order(COLS, 2), 20, H200).variant == choose_variant(20, H200)


def test_splits_suit_all_numbers_of_tokens_together() -> None:
    """12 splits win at 8 tokens, lose more at 64; 4 are good everywhere."""
    times = {12: {8: 1.0, 64: 4.0}, 4: {8: 1.2, 64: 1.0}}

    def microseconds(case: Case) -> float:
        return times.get(case.order.splits, {}).get(case.tokens, 5.0)

    assert tune.tune(ROWS, COLS, H200, microseconds, (8, 64))[0].splits == 4


def test_orders_that_are_compared() -> None:
    assert {(order.splits, order.instruction) for order in orders((16,), 100, A100)} == {
        (splits, Order.instruction) for splits in (1, 2)
    }
    for device in (H200, A100):
        first, *others = orders(ROWS, COLS, device)
        assert first == Order(COLS, estimate_splits(ROWS, COLS, device))
        assert len({first, *others}) == 1 + len(others)
    assert {order.instruction for order in orders(ROWS, COLS, H200)} == {Order.instruction, HOPPER[0].instruction}


def test_only_launches_that_can_be_made_are_measured() -> None:
    rows = (128 << 15,)  # more than one split of so many rows does not fit into a workspace
    choice, measured = tune.tune(rows, 512, H200, lambda case: 1.0, (8,))
    assert choice == Choice()
    assert {one.case.order.splits for one in measured} == {1}
    assert not any(one.case.variant.bulk for one in tune.tune(ROWS, COLS, A100, lambda case: 1.0)[1])


def test_an_order_without_all_measurements_is_not_chosen() -> None:
    def measured(splits: int, tokens: int, time: float) -> Measured:
        return Measured(Case(ROWS, Order(COLS, splits), tokens, choose_variant(tokens, H200)), time)

    both = [measured(2, 8, 5.0), measured(2, 64, 5.0)]
    assert tune.best_order([*both, measured(3, 8, 1.0)], Order(COLS, 4)) == Order(COLS, 2)
    with pytest.raises(UsageError, match="for all numbers of tokens, got none"):
        tune.best_order([measured(3, 8, 1.0), measured(2, 64, 1.0)], Order(COLS, 2))


def test_a_table_is_followed(folder: Path) -> None:
    write(folder, Choice(ESTIMATED + 1, {8: asdict(BULK[0])}))
    order = choose_order(ROWS, COLS, H200)
    assert order == Order(COLS, ESTIMATED + 1)
    assert [plans.plan(ROWS, order, tokens, H200).variant for tokens in (1, 8, 9)] == [*BULK[:1] * 2, VARIANTS[1]]
    assert plans.plan(ROWS, order, 8, H200, VARIANTS[0]).variant == VARIANTS[0]
    assert choose_order((2048,), COLS, H200).splits == estimate_splits((2048,), COLS, H200)
    assert plans.workspace_bytes(ROWS, order, H200) >= plans.plan(ROWS, order, 8, H200).workspace_bytes


def test_a_table_of_another_device_is_not_followed(folder: Path) -> None:
    write(folder, Choice(ESTIMATED + 1))
    half = DeviceProperties(H200.name, (9, 0), 66, H200.l2_bytes, H200.shared_bytes_per_block)
    for device in (A100, half):
        assert choose_order(ROWS, COLS, device).splits == estimate_splits(ROWS, COLS, device)


def test_variants_that_this_version_does_not_have_are_passed_over(folder: Path) -> None:
    write(folder, Choice(None, {8: {**asdict(VARIANTS[0]), "stages": 99}, 16: asdict(VARIANTS[0])}))
    order = choose_order(ROWS, COLS, H200)
    assert order.splits == ESTIMATED
    for tokens in (8, 16):
        assert plans.plan(ROWS, order, tokens, H200).variant == choose_variant(tokens, H200)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"shapes": [{}]}', '{"device": "x", "multiprocessors": 1, "shapes": 3}']
)
def test_damaged_tables_are_named(folder: Path, text: str) -> None:
    (folder / "h200.json").write_text(text)
    with pytest.raises(UsageError, match=r"h200\.json: expected a table of measured launches"):
        choose_order(ROWS, COLS, H200)


def test_splits_that_a_matrix_cannot_have_are_refused(folder: Path) -> None:
    write(folder, Choice(65))
    with pytest.raises(UsageError, match="1 to 64 splits"):
        choose_order(ROWS, COLS, H200)


def test_tables_survive_writing() -> None:
    table = {((8, 16), 64): Choice(2, {8: asdict(VARIANTS[0])}, "wgmma"), ((8,), 64): Choice()}
    assert tuned.parse(tuned.render("GPU", 7, table, commit="abc"), "x") == ("GPU", 7, table)


def test_file_names() -> None:
    assert tuned.file_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3.json"
