"""Directories in which files of two models, two compressions or two format versions lie together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitforbit import archive, errors
from bitforbit.cli.serve import choose
from bitforbit.format import checksum
from bitforbit.format.header import read_header
from helpers import assert_same_tree
from helpers.models import build_model, with_header

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

Change = Callable[[dict[str, Any]], None]
Mix = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of the same names and shapes, ``a`` and ``b``; ``ca``, ``cb``: compressed; ``xa``: in another way."""
    root = tmp_path_factory.mktemp("made")
    build_model(root / "a")
    shutil.copytree(root / "a", root / "b")
    for path in (root / "b").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    for name in ("a", "b"):
        archive.compress(root / name, root / f"c{name}")
    archive.compress(root / "a", root / "xa", exclude=["*mlp*"])
    return root


def edit_record(path: Path, change: Change) -> None:
    """Change a shard's record as a writer of another version would: with a checksum that is right."""
    header = read_header(path)
    data = path.read_bytes()[header.data_start :]
    record = json.loads(header.metadata["bitforbit"])
    change(record)
    text = json.dumps(record)
    tree = json.loads(header.raw_json)
    tree["__metadata__"] |= {"bitforbit": text, "bitforbit_xxh3": checksum.xxh3_64([text.encode()])}
    raw = json.dumps(tree).encode()
    path.write_bytes(with_header(raw + b" " * (-(len(raw) + 8) % 64), data))


def edit_manifest(directory: Path, change: Change) -> None:
    path = directory / "bitforbit.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def with_codec(**members: object) -> Change:
    def change(record: dict[str, Any]) -> None:
        for tensor in record["tensors"].values():
            if tensor["codec"] != "raw":
                tensor.update(members)

    return change


def copy(source: str, name: str) -> Mix:
    return lambda made, directory: shutil.copy(made / source / name, directory / name)  # type: ignore[return-value]


def record(change: Change) -> Mix:
    return lambda made, directory: edit_record(directory / SECOND, change)


def manifest(change: Change) -> Mix:
    return lambda made, directory: edit_manifest(directory, change)


Error = type[errors.FormatError]
REFUSED: dict[str, tuple[Mix, Error, str]] = {
    "a shard of another model": (copy("cb", SECOND), errors.MixedFilesError, SECOND),
    "a shard that is not compressed": (copy("a", SECOND), errors.MixedFilesError, SECOND),
    "the manifest of another model": (copy("cb", "bitforbit.json"), errors.MixedFilesError, FIRST),
    "a shard of a newer format": (record(lambda r: r.update(format_version=2)), errors.UnsupportedVersionError, SECOND),
    "a manifest of a newer format": (
        manifest(lambda m: m.update(format_version=2)),
        errors.UnsupportedVersionError,
        "bitforbit.json",
    ),
    "a newer version of a codec": (record(with_codec(codec_version=2)), errors.UnsupportedVersionError, SECOND),
    "an unknown codec": (record(with_codec(codec="rans")), errors.UnsupportedVersionError, SECOND),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(made: Path, tmp_path: Path, name: str) -> None:
    mix, error, culprit = REFUSED[name]
    mixed = tmp_path / "mixed"
    shutil.copytree(made / "ca", mixed)
    mix(made, mixed)
    with pytest.raises(error) as inspected:
        archive.inspect(mixed)
    with pytest.raises(error) as decompressed:
        archive.decompress(mixed, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    report = archive.verify(mixed)
    assert not report.ok
    (told,) = {
        failure.message for failure in report.errors if failure.error == error.__name__ and culprit in failure.path
    }
    for message in (str(inspected.value), str(decompressed.value), told):
        assert str(mixed / culprit) in message
        if error is errors.MixedFilesError:
            assert str(mixed / "bitforbit.json") in message
        else:
            assert "pip install --upgrade" in message


@pytest.mark.parametrize("name", ["another compression", "new members of the record", "new members of the manifest"])
def test_legitimate(made: Path, tmp_path: Path, name: str) -> None:
    """The original comes back. Of the first two, verify says that a file is not the one that was written."""
    mix = {
        "another compression": copy("xa", SECOND),
        "new members of the record": record(lambda r: r.update(note="of a later writer")),
        "new members of the manifest": manifest(lambda m: m.update(note="of a later writer")),
    }[name]
    mixed = tmp_path / "mixed"
    shutil.copytree(made / "ca", mixed)
    mix(made, mixed)
    archive.decompress(mixed, tmp_path / "restored")
    assert_same_tree(tmp_path / "restored", made / "a")
    failures = archive.verify(mixed).errors
    if "manifest" in name:
        assert not failures
    else:
        (failure,) = failures
        assert (failure.path, failure.error) == (SECOND, "ChecksumError")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_file_of_the_original(made: Path, tmp_path: Path, name: str) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(made / "ca", mixed)
    copy("a", name)(made, mixed)
    (failure,) = archive.verify(mixed).errors
    assert (failure.path, failure.error) == (name, "ChecksumError")


def test_serve_sees_the_config_of_the_original(made: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(made / "ca", mixed)
    copy("a", "config.json")(made, mixed)
    with pytest.raises(
        errors.MixedFilesError, match=r"config\.json: expected quant_method 'bitforbit'.*bitforbit\.json"
    ):
        choose(mixed, "m", "127.0.0.1", 8000, "exact", is_installed=lambda package: True)
