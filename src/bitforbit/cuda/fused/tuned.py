"""What was measured on a kind of GPU, as data: splits and variants by shape. GPUs without a file have none.

``tuned/<device>.json``, written by :mod:`bitforbit.cuda.fused.tune`, holds the device's name, its number of
multiprocessors, and per shape (rows of the matrices of a launch, columns) splits and instruction of its order of
summation and, by the largest number of tokens, the fields of a variant. The order is a property of the layer on that
kind of GPU and never depends on the number of tokens. Variants change no bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.errors import UsageError

FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Choice:
    """What to take for a shape instead of what the estimates say."""

    splits: int | None = None
    """None: as estimated."""
    variants: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """Fields of a variant by the largest number of tokens that it is taken for."""
    instruction: str | None = None
    """None: the one that all devices have."""


Table = Mapping[tuple[tuple[int, ...], int], Choice]
"""By rows and columns."""


def file_name(device: str) -> str:
    """``h200.json`` for NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-") + ".json"


def find(rows: tuple[int, ...], cols: int, properties: DeviceProperties) -> Choice:
    """What was measured for a shape; an empty choice if nothing was. Raises UsageError for a damaged file."""
    return load(properties.name, properties.multiprocessors).get((rows, cols), _NOTHING)


@lru_cache(maxsize=64)
def load(device: str, multiprocessors: int) -> Table:
    """The table of a kind of GPU; empty if there is none, or one for another number of multiprocessors."""
    path = FOLDER / file_name(device)
    if not path.is_file():
        return {}
    name, count, table = parse(path.read_text(), path.name)
    return table if (name, count) == (device, multiprocessors) else {}


def parse(text: str, name: str) -> tuple[str, int, Table]:
    """Device, multiprocessors and table of a file's text. Raises UsageError."""
    try:
        content = json.loads(text)
        table = {
            (tuple(map(int, shape["rows"])), int(shape["cols"])): Choice(
                None if shape["splits"] is None else int(shape["splits"]),
                {int(tokens): {key: int(value) for key, value in fields.items()}
                 for tokens, fields in shape["variants"].items()},
                None if shape["instruction"] is None else str(shape["instruction"]),
            )
            for shape in content["shapes"]
        }  # fmt: skip
        return str(content["device"]), int(content["multiprocessors"]), table
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{name}: expected a table of measured launches, got {type(error).__name__}: {error}; delete the file "
            "(launches are then estimated), or write it anew with python -m benchmarks.gpu_tune --write"
        ) from error


def render(device: str, multiprocessors: int, table: Table, **notes: Any) -> str:
    """The text of a file; notes, such as machine and versions, are for readers."""
    shapes = [{"rows": list(rows), "cols": cols, **vars(choice)} for (rows, cols), choice in sorted(table.items())]
    content = {"device": device, "multiprocessors": multiprocessors, **notes, "shapes": shapes}
    return json.dumps(content, indent=1) + "\n"


_NOTHING = Choice()
