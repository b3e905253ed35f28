"""Which matrices of a checkpoint are compressed together: one unit per layer, embedding and output head alone.

The result also has the form in which DFloat11 files state it: ``pattern_dict`` maps regular expressions over module
names to the modules, relative to a match, whose weights form the unit; an empty list stands for the module itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitforbit.archive.dfloat11.patterns import fullmatch
from bitforbit.errors import SourceNotFoundError, UsageError
from bitforbit.format.header import TensorEntry

PatternDict = Mapping[str, Sequence[str]]

_LAYER = re.compile(r"((?:[^.]+\.)*?(?:layers?|\w*blocks|h))\.(0|[1-9]\d*)\.(.+)\.weight")
_ALONE = re.compile(r"(?:[^.]+\.)*(embed_tokens|lm_head)")
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Two-dimensional weights of modules that are no linears; routers are no linears in newer model code.
_NO_LINEAR = re.compile(r"(?:.*\.)?(?:gate|router|\w*(?:norm|embed|bias)\w*)")


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit: the module's full name and the names of its matrices, in order."""

    name: str
    weights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """The units of a checkpoint and the ``pattern_dict`` that describes them."""

    units: tuple[Unit, ...]
    pattern_dict: PatternDict


def derive_units(tensors: Iterable[TensorEntry]) -> UnitPlan:
    """Units of a checkpoint whose tensors are given in file order.

    Every ``...layers.N``, ``...blocks.N`` or ``...h.N`` is a unit of its linears: q, k, v, o, gate, up, down, then
    others in file order. ``embed_tokens`` and ``lm_head`` are units of their own. Only matrices are taken: BF16, two
    dimensions, named ``*.weight``; everything else, and fused experts of three dimensions, stays as it is.
    """
    alone: dict[str, str] = {}
    stacks: dict[str, dict[int, list[str]]] = {}
    for entry in tensors:
        match = _LAYER.fullmatch(entry.name)
        if match:
            stack, number, module = match.groups()
            linears = stacks.setdefault(stack, {}).setdefault(int(number), [])
            if _is_matrix(entry) and not _NO_LINEAR.fullmatch(module):
                linears.append(module)
        elif entry.name.endswith(".weight") and _is_matrix(entry):
            module = entry.name.removesuffix(".weight")
            if _ALONE.fullmatch(module):
                alone[module] = entry.name
    order = sorted(alone, key=lambda module: (module.endswith("lm_head"), module))
    units = [Unit(module, (alone[module],)) for module in order]
    patterns: dict[str, list[str]] = {re.escape(module): [] for module in order}
    for stack, layers in stacks.items():
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, linears in sorted(layers.items()):
            ordered = tuple(_ordered(linears))
            groups.setdefault(ordered, []).append(number)
            if ordered:
                name = f"{stack}.{number}"
                units.append(Unit(name, tuple(f"{name}.{module}.weight" for module in ordered)))
        for ordered, numbers in groups.items():
            if ordered:
                which = r"\d+" if len(groups) == 1 else f"(?:{'|'.join(map(str, numbers))})"
                patterns[f"{re.escape(stack)}\\.{which}"] = list(ordered)
    return UnitPlan(tuple(units), patterns)


def _is_matrix(entry: TensorEntry) -> bool:
    return entry.dtype == "BF16" and len(entry.shape) == 2 and entry.nbytes > 0


def _ordered(modules: Sequence[str]) -> list[str]:
    leaves = [module.rpartition(".")[2] for module in modules]
    known = {leaf: module for leaf, module in zip(leaves, modules, strict=True) if leaves.count(leaf) == 1}
    first = [known[leaf] for leaf in _ORDER if leaf in known]
    return first + [module for module in modules if module not in first]


def units_from_patterns(pattern_dict: PatternDict, tensors: Iterable[TensorEntry]) -> UnitPlan:
    """Units that a ``pattern_dict`` names in a checkpoint. Raises UsageError where they do not fit it."""
    entries = {entry.name: entry for entry in tensors}
    modules = dict.fromkeys(
        ".".join(parts[:depth]) for parts in (name.split(".") for name in entries) for depth in range(1, len(parts))
    )
    units: list[Unit] = []
    owner: dict[str, str] = {}
    for pattern, attributes in pattern_dict.items():
        found = [module for module in modules if fullmatch(pattern, module)]
        if not found:
            raise UsageError(f"unit pattern {pattern!r} matches no module of the checkpoint; correct or remove it")
        for module in found:
            unit = Unit(module, weight_names(module, attributes))
            for name in unit.weights:
                _check_weight(name, entries.get(name), unit, owner)
            units.append(unit)
    return UnitPlan(tuple(units), pattern_dict)


def weight_names(module: str, attributes: Sequence[str]) -> tuple[str, ...]:
    """Names of the matrices of a unit."""
    return tuple(f"{module}.{attribute}.weight" for attribute in attributes) or (f"{module}.weight",)


def _check_weight(name: str, entry: TensorEntry | None, unit: Unit, owner: dict[str, str]) -> None:
    if entry is None:
        raise UsageError(f"unit {unit.name!r} names {name!r}, which is not in the checkpoint; correct the units")
    if not _is_matrix(entry):
        raise UsageError(
            f"unit {unit.name!r}: expected {name!r} to be a BF16 matrix, got {entry.dtype} {list(entry.shape)}; "
            "leave it out of the units"
        )
    if name in owner:
        raise UsageError(f"{name!r} is in the units {owner[name]!r} and {unit.name!r}; every weight has one unit")
    owner[name] = unit.name


def load_units_file(path: Path) -> dict[str, list[str]]:
    """Read a JSON file of the form of ``pattern_dict``. Raises SourceNotFoundError or UsageError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise SourceNotFoundError(f"{path}: expected a JSON file of units, got {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: expected JSON, got {e}") from None
    patterns = parse_pattern_dict(value)
    if patterns is None:
        raise UsageError(f'{path}: expected an object like {{"model\\\\.layers\\\\.\\\\d+": ["mlp.up_proj"]}}')
    return patterns


def parse_pattern_dict(value: object) -> dict[str, list[str]] | None:
    """A JSON value as ``pattern_dict``, or None if it is none."""
    if not isinstance(value, dict):
        return None
    for attributes in value.values():
        if not isinstance(attributes, list) or not all(isinstance(attribute, str) for attribute in attributes):
            return None
    return value
