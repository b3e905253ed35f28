"""Ten ways to damage a compressed model, and what bitforbit says to each.

    python examples/damaged_files.py

Works on copies of the model in the package, in a temporary directory.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bitforbit
from bitforbit import demo, errors
from bitforbit.format.header import build_header, read_header

SHARD = "model.safetensors"


def flip(path: Path, offset: int) -> None:
    """Invert one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def edit_header(path: Path, change: Callable[[str], str]) -> None:
    """Change the header's JSON as text."""
    header = read_header(path)
    text = change(header.raw_json.decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[header.data_start :])


def newer_version(root: Path) -> None:
    """A manifest of a format version that does not exist yet."""
    manifest = json.loads((root / "bitforbit.json").read_text())
    manifest["format_version"] = 2
    (root / "bitforbit.json").write_text(json.dumps(manifest))


def overlap(root: Path) -> None:
    """Two tensors that claim the same bytes."""
    header = read_header(root / SHARD)
    first, second, *rest = header.by_offset()
    moved = type(second)(second.name, second.dtype, second.shape, second.begin - 64, second.end - 64)
    data = (root / SHARD).read_bytes()[header.data_start :]
    (root / SHARD).write_bytes(build_header([first, moved, *rest], header.metadata) + data)


def truncate(path: Path) -> None:
    """Cut the last kilobyte off."""
    path.write_bytes(path.read_bytes()[:-1024])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte of the weights flipped": lambda root: flip(root / SHARD, -5_000_000),
    "a byte of the code tables flipped": lambda root: flip(root / SHARD, read_header(root / SHARD).data_start + 2),
    "a byte of the record flipped": lambda root: flip(root / SHARD, (root / SHARD).read_bytes().index(b"xxh3_stored")),
    "a byte of the tokenizer flipped": lambda root: flip(root / "tokenizer.json", 1000),
    "the shard truncated": lambda root: truncate(root / SHARD),
    "a header longer than the file": lambda root: flip(root / SHARD, 6),
    "two tensors that overlap": overlap,
    "a dtype that does not exist": lambda root: edit_header(root / SHARD, lambda t: t.replace('"U8"', '"U9"', 1)),
    "a newer format version": newer_version,
    "the shard missing": lambda root: (root / SHARD).unlink(),
}


def main() -> int:
    """Damage, try to restore, print; the status is 1 if anything went through."""
    unnoticed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for what, damage in DAMAGE.items():
            packed, restored = Path(temporary) / "packed", Path(temporary) / "restored"
            shutil.copytree(demo.model_path(), packed)
            damage(packed)
            try:
                bitforbit.decompress(packed, restored)
            except errors.BitforbitError as error:
                message = str(error).replace(temporary, "...")
                print(f"{what}\n    {type(error).__name__}: {message}\n")
            else:
                unnoticed += 1
                print(f"{what}\n    NOT NOTICED\n")
            if restored.exists() or list(Path(temporary).glob("*partial*")):
                unnoticed += 1
                print("    something was left behind\n")
            shutil.rmtree(packed)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
