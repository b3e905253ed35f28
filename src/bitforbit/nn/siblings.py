"""Linears of one module with the same input, such as q, k and v: on a GPU, mode ``"fused"`` multiplies by them at once.

Two things are kept apart. *Who may be multiplied together* goes by names and is settled when a model is compressed or
loaded: the order of summation follows from it, so a linear's outputs have the same bits whether it is multiplied
together with others or alone. *Who is multiplied together* is learned from calls: linears that were called one after
the other with the same tensor are computed by the first one's call the next time, and the others' calls find their
results. A result is used for the same tensor object in the same state only, and is freed as soon as that tensor is. A
wrong guess costs the time of a product, and is not made twice in a row.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from bitforbit.nn.gpu_specs import TilesSpec
from bitforbit.nn.spec import Parameters
from bitforbit.ops import direct
from bitforbit.ops.gpu import fused, runtime, volatile
from bitforbit.ops.gpu.fused import Matrix
from bitforbit.ops.gpu.runtime import Place

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)
"""Names of linears that share their input in common architectures."""


def find(model: nn.Module) -> None:
    """Settle which linears of a model may be multiplied together: of those that have no siblings yet."""
    from bitforbit.nn.classes import Linear

    for parent in model.modules():
        for names in NAMES:
            found = [parent._modules[name] for name in names if name in parent._modules]
            linears = [each for each in found if isinstance(each, Linear)]
            if len(linears) < 2 or any(each._bitforbit_siblings is not None for each in linears):
                continue
            specs = [each._bitforbit_specs["weight"] for each in linears]
            shapes = [spec.matrix_shape() for spec in specs]
            alike = len({(spec.dtype, cols) for spec, (_, cols) in zip(specs, shapes, strict=True)}) == 1
            if alike and len({id(each) for each in linears}) == len(linears):
                family = Family(tuple(rows for rows, _ in shapes))
                for place, each in enumerate(linears):
                    each.__dict__["_bitforbit_siblings"] = Sibling(family, place)


class Family:
    """Linears that may share their input. Copies know the numbers of rows only: the rest is learned again."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        """Rows of each linear."""
        self.rows = rows
        self.notes: dict[int, _Note] = {}
        """Weights of the linears, by place, when they were last multiplied alone."""
        self.runs: dict[int, tuple[int, ...]] = {}
        """Places of those that were called with the same tensor, by that of the first."""

    def __reduce__(self) -> Any:
        return Family, (self.rows,)


@dataclass(frozen=True)
class Sibling:
    """One linear's place in a family."""

    family: Family
    place: int

    @property
    def group(self) -> tuple[int, ...]:
        """Rows of all of the family's matrices, from which the order of summation follows."""
        return self.family.rows

    def linear(self, x: torch.Tensor, spec: TilesSpec, own: Parameters, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias`` in mode ``"fused"``; it may compute what the siblings' calls will ask for as well."""
        policy = runtime.current_policy()
        if (
            torch.compiler.is_compiling()
            or not policy.grouped
            or not direct.is_ordinary_call(x, bias)
            or not 0 < x.numel() <= fused.MAX_TOKENS * spec.cols
            or (spec.kind == "F8_E4M3" and x.dtype is not torch.bfloat16)
            or (x.is_inference() and not policy.grouped_in_inference_mode)
            or volatile.holds(own["tiles__weight"])
        ):
            return spec.linear(x, own, bias, "fused", self.group)
        return _local.calls.linear(self, _member(spec, own, bias), x)


class _Member(NamedTuple):
    """A linear's weight and bias as they are now."""

    spec: TilesSpec
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
    """Its parts and its bias."""
    versions: tuple[int, ...] | None
    """Counts of their changes in place; None if torch does not count them (inference tensors)."""

    def is_(self, other: _Member) -> bool:
        """Whether another one is the same tensors in the same state."""
        return (
            all(map(operator.is_, self.tensors, other.tensors))
            and self.versions == other.versions
            and self.spec == other.spec
        )

    @property
    def matrix(self) -> Matrix:
        """It, to be multiplied."""
        return Matrix(self.tensors[:4], self.spec.rows, self.tensors[4], self.spec.kind)


def _member(spec: TilesSpec, own: Parameters, bias: torch.Tensor | None) -> _Member:
    a, b, c, d = own["tiles__weight"], own["escapes__weight"], own["offsets__weight"], own["header__weight"]
    return _Member(spec, (a, b, c, d, bias), _versions(a, b, c, d, bias))


def _versions(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, bias: torch.Tensor | None
) -> tuple[int, ...] | None:
    try:
        return a._version, b._version, c._version, d._version, 0 if bias is None else bias._version
    except RuntimeError:
        return None


class _Note:
    """What finds a weight again, if it is as it was; it does not keep it alive."""

    def __init__(self, member: _Member) -> None:
        self._spec, self._versions = member.spec, member.versions
        *parts, bias = member.tensors
        self._parts = tuple(map(weakref.ref, parts))
        self._bias = None if bias is None else weakref.ref(bias)

    def member(self) -> _Member | None:
        """The weight; None if its tensors are gone or were written to."""
        a, b, c, d = [part() for part in self._parts]
        bias = None if self._bias is None else self._bias()
        if a is None or b is None or c is None or d is None or (self._bias is not None and bias is None):
            return None
        versions = _versions(a, b, c, d, bias)
        return _Member(self._spec, (a, b, c, d, bias), versions) if versions == self._versions else None


class _Input:
    """A tensor as it is now, not kept alive."""

    def __init__(self, x: torch.Tensor, where: Place, on_death: Callable[[Any], None] | None = None) -> None:
        self._x = weakref.ref(x, on_death)
        self._state = _state_of_input(x, where)

    def is_(self, x: torch.Tensor, where: Place) -> bool:
        """Whether this is that tensor, unchanged, and work is enqueued in the same place."""
        return self._x() is x and self._state == _state_of_input(x, where)


class _Results:
    """Products that the call of the first of a family has computed, for the calls of others."""

    def __init__(self, family: Family, run: tuple[int, ...]) -> None:
        self.family = family
        self.run = run
        self.input: _Input | None = None
        self.products: dict[int, tuple[_Member, torch.Tensor]] = {}

    def drop(self) -> None:
        """Free them. They were computed in vain: not again, until calls say otherwise."""
        if self.products:
            self.products.clear()
            if self.family.runs.get(self.run[0]) == self.run:
                self.family.runs.pop(self.run[0], None)


class _Calls:
    """Calls of one thread: the last ones with the same tensor, and what siblings have not asked for yet."""

    def __init__(self) -> None:
        self._results: _Results | None = None
        self._family: weakref.ref[Family] | None = None
        self._run: tuple[int, ...] = ()
        self._input: _Input | None = None

    def linear(self, one: Sibling, member: _Member, x: torch.Tensor) -> torch.Tensor:
        """The product for a call of ``one``."""
        where = runtime.current_place(member.tensors[0].device)
        found = self._take(one, member, x, where)
        if found is not None:
            return found
        run = one.family.runs.get(one.place, ())
        members = self._members(one, member, run, where)
        if members:
            return self._multiply(one, run, members, x, where)
        (out,) = direct.ordinary_tiles_linears(x, (member.matrix,), member.spec.cols, one.group)
        self._learn(one, member, x, where)
        return out

    def _take(self, one: Sibling, member: _Member, x: torch.Tensor, where: Place) -> torch.Tensor | None:
        """The product, if it is there; results that are not asked for are dropped."""
        results = self._results
        if results is None:
            return None
        if results.family is one.family and results.input is not None and results.input.is_(x, where):
            then, product = results.products.get(one.place, (None, None))
            if then is not None and then.is_(member):
                del results.products[one.place]
                if not results.products:
                    self._results = None
                return product
        results.drop()
        self._results = None
        return None

    def _members(self, one: Sibling, member: _Member, run: tuple[int, ...], where: Place) -> dict[int, _Member]:
        """The weights to multiply by now: none if they have changed, or are not ready for the capture of a graph."""
        found = {one.place: member}
        for place in run[1:]:
            note = one.family.notes.get(place)
            other = None if note is None else note.member()
            if other is None or (other.spec.cols, other.spec.dtype) != (member.spec.cols, member.spec.dtype):
                one.family.runs.pop(one.place, None)
                return {}
            found[place] = other
        if len(found) < 2 or (where.capture and not _prepare(found, one)):
            return {}
        return found

    def _multiply(
        self, one: Sibling, run: tuple[int, ...], members: dict[int, _Member], x: torch.Tensor, where: Place
    ) -> torch.Tensor:
        matrices = [member.matrix for member in members.values()]
        products = direct.ordinary_tiles_linears(x, matrices, members[one.place].spec.cols, one.group)
        self._results = results = _Results(one.family, run)
        reference = weakref.ref(results)  # as an input's callback must not keep its results alive

        def drop(_: Any) -> None:
            results = reference()
            if results is not None:
                results.drop()

        results.input = _Input(x, where, drop)
        kept = zip(members.items(), products, strict=True)
        results.products = {place: (member, product) for (place, member), product in kept}
        return results.products.pop(one.place)[1]

    def _learn(self, one: Sibling, member: _Member, x: torch.Tensor, where: Place) -> None:
        """Note a call that nothing was computed for before."""
        family = one.family
        follows = (
            self._family is not None
            and self._family() is family
            and self._input is not None
            and self._input.is_(x, where)
            and one.place not in self._run
        )
        self._run = (*self._run, one.place) if follows else (one.place,)
        self._family, self._input = weakref.ref(family), _Input(x, where)
        if member.versions is None:
            return
        family.notes[one.place] = _Note(member)
        if follows:
            family.runs[self._run[0]] = self._run
            members = {place: note.member() for place in self._run if (note := family.notes.get(place)) is not None}
            found = {place: each for place, each in members.items() if each is not None}
            if len(found) == len(self._run) and not where.capture:
                _prepare(found, one)  # now, so that the next pass may be the capture of a graph


class _Local(threading.local):
    def __init__(self) -> None:
        self.calls = _Calls()


_local = _Local()


def _prepare(members: dict[int, _Member], one: Sibling) -> bool:
    return fused.prepare([each.matrix for each in members.values()], members[one.place].spec.cols, one.group)


def _state_of_input(x: torch.Tensor, where: Place) -> tuple[Any, ...]:
    version = None if x.is_inference() else x._version
    return where, version, x.data_ptr(), x.shape, x.stride(), torch.is_inference_mode_enabled()
