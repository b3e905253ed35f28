"""Verdicts of the probe on disk: one JSON file per environment (machine, libraries, settings).

They lie in ``bitforbit.cachedir``. The file is only ever replaced as
a whole; what several processes find is merged. A file that cannot be read is ignored and written anew; a directory that
cannot be written costs nothing but the time of the next probe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import bitforbit
from bitforbit.cachedir import directory
from bitforbit.cpu.linear import Order, families

_VERSION = 1
_SETTINGS = ("ONEDNN_", "DNNL_", "MKL_", "ATEN_CPU_CAPABILITY")
_NO_SETTING = ("VERBOSE",)
_CPU_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags", "Features")

Key = tuple[int | str | bool, ...]
Verdicts = dict[Key, Order | None]


def environment() -> dict[str, str]:
    """Everything that torch's choice of a kernel may depend on, but for what belongs to one product."""
    facts = {
        "bitforbit": bitforbit.__version__,
        "torch": torch.__version__,
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        **_caches(),
    }
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            if name.strip() in _CPU_FACTS:
                facts[name.strip()] = value.strip()
    for name, value in os.environ.items():
        if name.startswith(_SETTINGS) and not name.endswith(_NO_SETTING):
            facts[name] = value
    return dict(sorted(facts.items()))


def path() -> Path:
    """The file of this environment."""
    name = hashlib.sha256(json.dumps(environment()).encode()).hexdigest()[:16]
    return directory() / f"orders-{name}.json"


def load(file: Path) -> Verdicts:
    """The verdicts of a file; none if it is missing, damaged or of another version."""
    try:
        content = json.loads(file.read_bytes())
        if content["version"] != _VERSION or content["environment"] != environment():
            return {}
        return {_key(entry["product"]): _order(entry["order"]) for entry in content["verdicts"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def store(file: Path, verdicts: Verdicts, forget: Key | None = None) -> None:
    """Replace the file by its verdicts and these, but for one to forget."""
    merged = {**load(file), **verdicts}
    merged.pop(forget, None) if forget else None
    entries = [
        {"product": list(key), "order": None if order is None else [order.family, order.k_block]}
        for key, order in merged.items()
    ]
    replace_file(file, {"version": _VERSION, "environment": environment(), "verdicts": entries})


def replace_file(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as a whole; where that is impossible, there is none."""
    with contextlib.suppress(OSError, RuntimeError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.stem, suffix=".tmp", delete=False) as new:
            try:
                json.dump(content, new, indent=1)
                new.close()
                os.replace(new.name, file)  # noqa: PTH105
            except OSError:
                os.unlink(new.name)  # noqa: PTH108
                raise


def _caches() -> dict[str, str]:
    """Sizes of the CPU's caches, from which oneDNN derives its blocks."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError):
            found[f"cache {index.name}"] = f"{(index / 'size').read_text().strip()}"
    return found


def _key(items: list[int | str | bool]) -> Key:
    if not all(isinstance(item, int | str) for item in items):
        raise TypeError("a product is named by numbers and strings")
    return tuple(items)


def _order(entry: list[str | int] | None) -> Order | None:
    if entry is None:
        return None
    family, k_block = entry
    if family not in families() or type(k_block) is not int or k_block < 0:
        raise ValueError("an order of another library")
    return Order(str(family), k_block)
