"""Exact mode straight from tiles where the order was proven: torch's linear is one of a known order here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.cuda.fused.order import Order
from bitforbit.errors import OrderMismatchError, UsageError
from bitforbit.ops import stats
from bitforbit.ops.gpu import Policy, Product, order_probe, proofs, runtime
from helpers.gpu_weights import LAYOUTS
from helpers.order_cases import linear_in
from torch_helpers import assert_same_bits, gaussian

CPU = torch.device("cpu")
ROWS, COLS = 40, 200
ORDER = Order(COLS, 2, reduction="ascending", partials="BF16")
PRODUCT = Product(ROWS, COLS, 3, 2, 256, 0)


@pytest.fixture
def probed(emulated: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Product]]:
    """A fresh cache, a probe that finds ORDER for an odd number of tokens, and what it was asked."""
    calls: list[Product] = []

    def find_order(linear: object, device: torch.device, product: Product) -> Order | None:
        calls.append(product)
        return replace(ORDER, cols=product.cols) if product.tokens % 2 else None

    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITFORBIT_PARANOID", raising=False)
    monkeypatch.setattr(order_probe, "find_order", find_order)
    proofs.clear()
    stats.reset()
    with proofs.examine(linear_in(ORDER)), ops.gpu.use_policy(Policy(prove_after=1)):
        yield calls
    proofs.clear()


def x_of(*shape: int, offset: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return order_probe._placed(values, offset or 256)


def counts() -> tuple[int, int]:
    found = stats.snapshot()
    return found["fused_exact"].linears, found["decoded"].linears


@pytest.mark.parametrize("shape", [(COLS,), (3, COLS), (1, 5, COLS)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_proven_products_have_the_bits_of_their_order(probed: list[Product], shape: tuple[int, ...], with_bias: bool):
    case = LAYOUTS["tiles"](gaussian((ROWS, COLS)))
    bias = order_probe._placed(gaussian((ROWS,), seed=3)) if with_bias else None
    x = x_of(*shape)
    got = case.linear(x, bias, "exact")
    if with_bias and len(shape) == 1:  # torch adds the bias apart
        assert counts() == (0, 1)
        assert_same_bits(got, functional.linear(x, case.weight, bias))
        return
    assert_same_bits(got, linear_in(ORDER)(x, case.weight, bias))
    assert counts() == (1, 0)
    assert probed == [Product(ROWS, COLS, x.numel() // COLS, len(shape), 256, 256 if with_bias else 0)]


def test_others_are_decoded(probed: list[Product]) -> None:
    case = LAYOUTS["tiles"](gaussian((ROWS, COLS)))
    for x in (x_of(2, COLS), x_of(5, 2 * COLS)[:, ::2], x_of(65, COLS), x_of(1, 1, 3, COLS), x_of(0, COLS)):
        assert_same_bits(case.linear(x, None, "exact"), functional.linear(x, case.weight))
    assert counts() == (0, 5)
    assert probed == [replace(PRODUCT, tokens=2)]
    small = LAYOUTS["tiles"](gaussian((8, COLS)))
    small.linear(x_of(3, COLS), None, "exact")
    fp32_bias = torch.ones(ROWS)
    with pytest.raises(RuntimeError):  # as torch does
        case.linear(x_of(3, COLS), fp32_bias, "exact")
    assert len(probed) == 1


@pytest.mark.parametrize("layout", ["df11", "planes"])
def test_layouts_without_such_a_kernel(probed: list[Product], layout: str) -> None:
    case = LAYOUTS[layout](gaussian((ROWS, COLS)))
    x = x_of(3, COLS)
    assert_same_bits(case.linear(x, None, "exact"), functional.linear(x, case.weight))
    assert not probed


def test_decoding_ahead_goes_on_beside_proven_products(probed: list[Product], emulated: Any) -> None:
    """Weights 0 and 2 are decoded, 1 is not: 2 is decoded beside the product of 0, and used. Later 2 is proven, too."""
    cases = [LAYOUTS["tiles"](gaussian((rows, COLS), seed=rows)) for rows in (32, ROWS, 48)]
    with proofs._lock:
        ops.gpu.prove([PRODUCT], CPU)
        for rows in (32, 48):
            proofs._state.verdicts[(*proofs._settings(CPU), *vars(replace(PRODUCT, rows=rows)).values())] = None
    x = x_of(3, COLS)

    def launches() -> list[str]:
        emulated.launches.clear()
        for case in cases:
            case.linear(x, None, "exact")
        return [name for name, _ in emulated.launches]

    launches()
    assert launches() == ["tiles_decode", "tiles_decode", "fused_linear"]
    third = replace(PRODUCT, rows=48)
    proofs._state.verdicts[(*proofs._settings(CPU), *vars(third).values())] = ORDER
    assert launches() == ["tiles_decode", "tiles_decode", "fused_linear", "fused_linear"]
    assert not any(prefetcher._ahead for _, prefetcher in runtime._local.prefetchers.values())
    assert launches() == ["tiles_decode", "fused_linear", "fused_linear"]


def test_mode_fused_keeps_its_own_order(probed: list[Product]) -> None:
    LAYOUTS["tiles"](gaussian((ROWS, COLS))).linear(x_of(3, COLS), None, "fused")
    assert not probed
    assert stats.snapshot()["fused"].linears == 1


def test_it_can_be_switched_off(probed: list[Product]) -> None:
    case, x = LAYOUTS["tiles"](gaussian((ROWS, COLS))), x_of(3, COLS)
    with ops.gpu.use_policy(Policy(proven_orders=False, prove_after=1)):
        assert_same_bits(case.linear(x, None, "exact"), functional.linear(x, case.weight))
    assert not probed


def test_probed_once_when_used_often_enough(probed: list[Product]) -> None:
    case, x = LAYOUTS["tiles"](gaussian((ROWS, COLS))), x_of(3, COLS)
    for policy, expected in ((Policy(prove_after=None), (0, 4)), (Policy(prove_after=3), (2, 6))):
        with ops.gpu.use_policy(policy):
            for _ in range(4):
                case.linear(x, None, "exact")
        assert counts() == expected
    assert probed == [PRODUCT]


def test_nothing_is_probed_or_uploaded_in_a_capture(probed: list[Product], monkeypatch: pytest.MonkeyPatch) -> None:
    case, x = LAYOUTS["tiles"](gaussian((ROWS, COLS))), x_of(3, COLS)
    place = runtime.current_place(CPU)

    def call() -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "current_place", lambda device: replace(place, capture=1))
            return case.linear(x, None, "exact")

    call()
    assert (counts(), probed) == ((0, 1), [])
    ops.gpu.prove([PRODUCT], CPU)
    call()  # proven, but its table is not there
    assert counts() == (0, 2)
    case.linear(x, None, "exact")
    assert_same_bits(call(), linear_in(ORDER)(x, case.weight, None))
    assert counts() == (2, 2)


def test_every_part_of_a_product_counts(probed: list[Product]) -> None:
    others = [
        replace(PRODUCT, **part)
        for part in (
            {"rows": 80}, {"cols": 320}, {"tokens": 4}, {"dims": 3}, {"x_alignment": 16}, {"bias_alignment": 256},
        )
    ]  # fmt: skip
    found = ops.gpu.prove([PRODUCT, *others, PRODUCT], CPU)
    assert probed == [PRODUCT, *others] == list(found)
    assert [order is None for order in found.values()] == [False, False, False, True, False, False, False]
    out_of_reach = [replace(PRODUCT, **part) for part in ({"tokens": 65}, {"tokens": 0}, {"rows": 8}, {"cols": 32})]
    assert set(ops.gpu.prove(out_of_reach, CPU).values()) == {None}
    assert len(probed) == 7


@pytest.mark.parametrize("offset", [2, 16, 128, 256])
def test_where_x_lies_counts(probed: list[Product], offset: int) -> None:
    LAYOUTS["tiles"](gaussian((ROWS, COLS))).linear(x_of(3, COLS, offset=offset), None, "exact")
    assert probed == [replace(PRODUCT, x_alignment=offset)]


def test_a_new_process_reads_the_verdicts(probed: list[Product]) -> None:
    even = replace(PRODUCT, tokens=2)
    before = ops.gpu.prove([PRODUCT, even], CPU)
    proofs.clear()
    assert ops.gpu.prove([PRODUCT, even], CPU) == before == {PRODUCT: ORDER, even: None}
    proofs.clear()
    LAYOUTS["tiles"](gaussian((ROWS, COLS))).linear(x_of(3, COLS), None, "exact")
    assert counts() == (1, 0)
    assert len(probed) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100000, b'{"version": 2}',
        b'{"version": 1, "environment": {}, "verdicts": []}',
    ],
    ids=["empty", "cut off", "a list", "null", "no text", "deep", "another version", "another machine"],
)  # fmt: skip
def test_files_that_make_no_sense_are_replaced(probed: list[Product], content: bytes) -> None:
    proofs.path().parent.mkdir(parents=True)
    proofs.path().write_bytes(content)
    assert ops.gpu.prove([PRODUCT], CPU) == {PRODUCT: ORDER}
    assert list(proofs.load(proofs.path()).values()) == [ORDER]


@pytest.mark.parametrize(
    "change",
    [
        {"splits": 9}, {"splits": True}, {"splits": "2"}, {"splits": -1}, {"reduction": "sideways"}, {"cols": 256},
        {"instruction": "wgmma.m64n8k4"}, {"bias_rounded": True}, {"bias_rounded": 1}, {"longer": 1}, {"speed": 3},
        {"split_tiles": 10**30},
    ],
    ids=str,
)  # fmt: skip
def test_orders_that_make_no_sense_are_proven_anew(probed: list[Product], change: dict[str, object]) -> None:
    ops.gpu.prove([PRODUCT], CPU)
    content = json.loads(proofs.path().read_text())
    content["verdicts"][0]["order"].update(change)
    proofs.path().write_text(json.dumps(content))
    proofs.clear()
    assert ops.gpu.prove([PRODUCT], CPU) == {PRODUCT: ORDER}
    assert len(probed) == 2


@pytest.mark.parametrize("entry", [[], {}, {"product": 3, "order": None}, {"product": [None], "order": None}])
def test_entries_that_make_no_sense_are_proven_anew(probed: list[Product], entry: object) -> None:
    ops.gpu.prove([PRODUCT], CPU)
    content = json.loads(proofs.path().read_text())
    content["verdicts"].append(entry)
    proofs.path().write_text(json.dumps(content))
    proofs.clear()
    assert ops.gpu.prove([PRODUCT], CPU) == {PRODUCT: ORDER}
    assert len(probed) == 2


def test_another_environment_has_a_file_of_its_own(probed: list[Product], monkeypatch: pytest.MonkeyPatch) -> None:
    here = proofs.path()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert proofs.path() != here
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(proofs, "_libraries", lambda: {"cublas": "130001"})
    assert proofs.path() != here


def test_what_does_not_fit_into_memory_is_probed_later(probed: list[Product], monkeypatch: pytest.MonkeyPatch) -> None:
    case, x = LAYOUTS["tiles"](gaussian((ROWS, COLS))), x_of(3, COLS)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(order_probe, "find_order", full)
        assert_same_bits(case.linear(x, None, "exact"), functional.linear(x, case.weight))
        with pytest.raises(torch.OutOfMemoryError):
            ops.gpu.prove([PRODUCT], CPU)
    assert not proofs.path().exists()
    case.linear(x, None, "exact")
    assert counts() == (1, 1)


def test_paranoid(probed: list[Product], monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoded product is torch's own, in another order: a wrong proof is found and withdrawn."""
    torch_like = LAYOUTS["tiles"](torch.ones(ROWS, COLS).bfloat16())  # of ones, every order gives the same
    case, x = LAYOUTS["tiles"](gaussian((ROWS, COLS))), x_of(3, COLS)
    monkeypatch.setenv("BITFORBIT_PARANOID", "1")
    torch_like.linear(torch.ones(3, COLS).bfloat16(), None, "exact")
    assert counts() == (1, 0)
    proofs.clear()
    wrong = Order(COLS, 4, reduction="halves", partials="running BF16")
    monkeypatch.setattr(order_probe, "find_order", lambda *_: wrong)
    with pytest.raises(OrderMismatchError, match=r"expected .* 40 x 200 .* got \d+ of 120"):
        case.linear(x, None, "exact")
    assert_same_bits(case.linear(x, None, "exact"), functional.linear(x, case.weight))
    proofs.clear()
    assert proofs.load(proofs.path()).get((*proofs._settings(CPU), *vars(PRODUCT).values())) is None
    monkeypatch.setenv("BITFORBIT_PARANOID", "often")
    with pytest.raises(UsageError, match="BITFORBIT_PARANOID"):
        case.linear(x, None, "exact")


def test_gradients_and_compilation(probed: list[Product]) -> None:
    case, x = LAYOUTS["tiles"](gaussian((ROWS, COLS))), x_of(3, COLS)
    leaf = x.clone().requires_grad_()
    y = case.linear(order_probe._placed(x).requires_grad_(), None, "exact")
    assert_same_bits(y, linear_in(ORDER)(x, case.weight, None))
    functional.linear(leaf, case.weight).sum().backward()
    other = order_probe._placed(x).requires_grad_()
    case.linear(other, None, "exact").sum().backward()
    assert_same_bits(other.grad, leaf.grad)


def test_from_probe_to_product(emulated: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is replaced but torch's linear."""
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path))
    proofs.clear()
    stats.reset()
    case, x = LAYOUTS["tiles"](gaussian((ROWS, COLS))), x_of(3, COLS)
    with ops.gpu.use_policy(Policy(prove_after=2)), proofs.examine(linear_in(ORDER)):
        case.linear(x, None, "exact")
        assert_same_bits(case.linear(x, None, "exact"), linear_in(ORDER)(x, case.weight, None))
    assert counts() == (1, 1)
    proofs.clear()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cpu_is_refused_or_left_alone(emulated: object) -> None:
    with pytest.raises(UsageError, match="CUDA device"):
        ops.gpu.prove([PRODUCT], CPU)
    with ops.gpu.use_policy(Policy(prove_after=1)):
        case, x = LAYOUTS["tiles"](gaussian((ROWS, COLS))), x_of(3, COLS)
        assert_same_bits(case.linear(x, None, "exact"), functional.linear(x, case.weight))
