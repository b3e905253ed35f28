"""Benchmarks of fused products: shapes, figures, the gate, the budget of time, the table that is written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.gpu_common import DryMeter, Graph, Meter, Report
from benchmarks.gpu_shapes import Shape

from benchmarks import gpu_common, gpu_linear, gpu_operands, gpu_shapes, gpu_tune
from bitforbit.cuda.fused import linear as fused
from bitforbit.cuda.fused import tuned
from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.fused.tuned import Choice
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.ops.gpu import order_probe, proofs
from helpers.order_cases import linear_in

SHAPE = Shape("tiny", "k, v", (32,), 192)
H200 = DeviceProperties("NVIDIA H200", (9, 0), 132, 50 << 20, 227 << 10)


@pytest.fixture
def meter() -> Iterator[Meter]:
    with gpu_common.meter(dry_run=True) as found:
        yield found


@pytest.mark.parametrize(
    ("model", "layers", "norms", "parameters"),
    [
        (gpu_shapes.LLAMA_8B, 32, 65 * 4096, 8_030_261_248),
        (gpu_shapes.QWEN_32B, 64, 129 * 5120 + 64 * 256, 32_762_123_264),
        (gpu_shapes.LLAMA_70B, 80, 161 * 8192, 70_553_706_496),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_shapes_are_those_of_the_models(model: gpu_shapes.Model, layers: int, norms: int, parameters: int) -> None:
    embedding = model.vocabulary * model.hidden
    assert layers * sum(shape.weights for shape in model.layer) + 2 * embedding + norms == parameters
    assert len({(shape.rows, shape.cols) for shape in model.shapes}) == len(model.shapes)


def test_figures() -> None:
    rounds = {"bf16": [30.0, 40.0, 36.0], "bf16 joined": [20.0, 22.0, 24.0], "fused": [16.0, 11.0, 16.0]}
    found = gpu_linear.figures(rounds, nbytes=16_000_000, copy_gb_per_s=2000.0)
    assert found == {
        "ratio": 1.5,  # of 1.25, 2 and 1.5, against the faster of the two
        "gb_per_s": 1000.0,
        "bound_us": 8.0,
        "of_bound": 0.5,
        "ratio_at_bound": 2.75,
    }
    assert set(gpu_linear.figures({"bf16": [], "fused": []}, 1, None).values()) == {None}


def test_the_gate_opens(meter: Meter) -> None:
    operands = gpu_operands.Operands(meter, SHAPE)
    errors = operands.check((1, 3, 128))
    assert 0 < errors["fused"] < 0.01 * float(operands.torch_products(3)[0]()[0].float().norm())  # type: ignore[operator]


def break_last(operands: gpu_operands.Operands, monkeypatch: pytest.MonkeyPatch, tokens: int, factor: float) -> None:
    """The last output is wrong where there are so many tokens."""
    multiply = operands.fused

    def wrong(count: int, *arguments: Any) -> Any:
        out = multiply(count, *arguments)
        out[-1] *= factor if count == tokens else 1
        return out

    monkeypatch.setattr(operands, "fused", wrong)


@pytest.mark.parametrize(("tokens", "message"), [(3, "fused .* and plain: 1 elements"), (1, "1 and 3 tokens: 1 elem")])
def test_the_gate_sees_every_bit(meter: Meter, monkeypatch: pytest.MonkeyPatch, tokens: int, message: str) -> None:
    operands = gpu_operands.Operands(meter, SHAPE)
    break_last(operands, monkeypatch, tokens, 1.01)
    with pytest.raises(AssertionError, match=message):
        operands.check((1, 3))


def test_the_gate_sees_errors_that_both_kernels_make(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = gpu_operands.Operands(meter, SHAPE)
    break_last(operands, monkeypatch, 3, 1.1)
    monkeypatch.setattr(operands, "_expected", lambda count, order: operands.outputs(operands.fused(count), count))
    with pytest.raises(AssertionError, match="expected an error of at most torch's"):
        operands.check((3,))


@pytest.mark.parametrize("known", [True, False])
def test_exact_mode_has_a_figure_of_its_own_where_the_order_is_proven(
    meter: Meter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: bool
) -> None:
    order = Order(SHAPE.cols, 2)
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(order_probe, "find_order", lambda *_: order if known else None)
    monkeypatch.setattr(gpu_linear.Operands, "torch_products", lambda self, tokens: [
        partial(lambda x, copy: [linear_in(order)(x, copy.plain[0], None)], self.x[:tokens], copy)
        for copy in self.copies
    ])  # fmt: skip
    operands = gpu_operands.Operands(meter, SHAPE)
    operands.x = order_probe._placed(operands.x, 256)
    proofs.clear()
    graphs = gpu_linear.sides(meter, operands, 3, with_exact=True)
    proofs.clear()
    assert ("exact, proven" in graphs) == known
    assert {"bf16", "fused", "exact, at use", "exact, ahead"} <= set(graphs)


def test_other_models_wait_for_the_first_one(meter: Meter) -> None:
    size = gpu_linear.Size((SHAPE, Shape("other", "o", (32,), 192)), (1,), (), 1 << 12)
    report = Report(None)
    gpu_linear.measure(meter, size, report, seconds=0)
    assert report.result["no_time_for"] == ["other o 32 x 192"]
    assert [line["model"] for line in report.result["products"]] == ["tiny"]
    assert report.end() == 0
    assert "no time for other o" in gpu_linear.show(report.result)


def test_a_shape_that_fails_stops_no_other(
    meter: Meter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = fused.prepare
    calls = iter([RuntimeError("out of order")])

    def broken(*arguments: Any) -> Any:
        if (error := next(calls, None)) is not None:
            raise error
        return prepare(*arguments)

    monkeypatch.setattr(fused, "prepare", broken)
    size = gpu_linear.Size((SHAPE, Shape("tiny", "o", (48,), 192)), (1,), (), 1 << 12)
    report = Report(None)
    gpu_linear.measure(meter, size, report, None)
    assert [line["kind"] for line in report.result["products"]] == ["o"]
    assert report.end() == 1
    assert "FAILED tiny k, v 32 x 192: RuntimeError: out of order" in capsys.readouterr().out


class Clock(DryMeter):
    """Launches with 3 splits are fast."""

    measures = True

    def capture(self, calls: Any) -> Graph:
        return Graph(3 if calls[0].args[2].splits == 3 else 1, None, [])

    def in_turns(self, graphs: Any, rounds: int = 15) -> dict[str, list[float]]:
        return {name: [6.0 / graph.calls] * rounds for name, graph in graphs.items()}


def test_tuning_finds_what_is_fastest_and_writes_it(
    meter: Meter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = gpu_tune.Size((SHAPE,), (8,), gpu_tune.EXTRA[:1])
    choice, measured, (extra,) = gpu_tune.search(Clock(), SHAPE, size, Report(None))
    assert choice == Choice(3)
    assert {one.microseconds for one in measured} == {2.0, 6.0}
    assert (extra.case.variant, extra.case.order.splits) == (gpu_tune.EXTRA[0], 3)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    tuned.load.cache_clear()
    key, other = (SHAPE.rows, SHAPE.cols), ((7,), 64)
    for choices in ({key: choice, other: Choice(1)}, {key: Choice(2)}, {other: Choice()}):
        path = gpu_tune.write(H200, choices)
        tuned.load.cache_clear()
    assert path.name == "h200.json"
    assert tuned.parse(path.read_text(), path.name) == (H200.name, 132, {key: Choice(2)})


def test_a_dry_run_writes_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_tune.main(["--dry-run", "--write"])
    assert "a dry run measures nothing" in capsys.readouterr().err
