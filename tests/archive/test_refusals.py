"""What is refused before anything is written, and files that were damaged afterwards."""

from __future__ import annotations

import base64
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitforbit import archive, errors
from bitforbit.format import checksum
from bitforbit.format.header import build_header, read_header
from bitforbit.format.layout import open_shard
from bitforbit.format.spec import part_name
from helpers import digest_tree
from helpers.models import build_model, gaussian, safetensors_bytes, split_file, with_header


def only(root: Path, name: str) -> Path:
    root.mkdir()
    (root / name).write_bytes(b"x")
    return root


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl"])
def test_pickles(name: str, tmp_path: Path) -> None:
    src = only(tmp_path / "m", name)
    for path in (src, src / name):
        with pytest.raises(errors.PickleRefusedError, match="convert"):
            archive.compress(path, tmp_path / "c")
        with pytest.raises(errors.PickleRefusedError):
            archive.inspect(path)


def test_gguf_nothing_and_missing(tmp_path: Path) -> None:
    with pytest.raises(errors.GgufRefusedError):
        archive.compress(only(tmp_path / "g", "m.gguf"), tmp_path / "c")
    for name in ("g", "t"):
        src = tmp_path / "t"
        shutil.rmtree(src, ignore_errors=True)
        with pytest.raises(errors.SourceNotFoundError):
            archive.compress(only(src, name), tmp_path / "c")
    with pytest.raises(errors.SourceNotFoundError):
        archive.compress(tmp_path / "absent", tmp_path / "c")
    with pytest.raises(errors.SourceNotFoundError):
        archive.verify(tmp_path / "absent")
    assert not (tmp_path / "c").exists()


def test_already_compressed(model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "c")
    for src in (tmp_path / "c", next((tmp_path / "c").glob("*.safetensors"))):
        with pytest.raises(errors.AlreadyCompressedError):
            archive.compress(src, tmp_path / "d")
    for config in ({"quantization_config": {"quant_method": "bitforbit"}}, {"dfloat11_config": {}}):
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(errors.AlreadyCompressedError):
            archive.compress(model, tmp_path / "d")
    (model / "config.json").write_text("{}")
    shutil.copy(next((tmp_path / "c").glob("*.safetensors")), model / "stray.safetensors")
    with pytest.raises(errors.AlreadyCompressedError):
        archive.compress(model, tmp_path / "d")


def test_not_compressed(model: Path, tmp_path: Path) -> None:
    for src in (model, next(model.glob("*.safetensors")), model / "README.md"):
        with pytest.raises(errors.NotCompressedError):
            archive.decompress(src, tmp_path / "r")
        with pytest.raises(errors.NotCompressedError):
            archive.verify(src)


def test_destinations(model: Path, tmp_path: Path) -> None:
    before = digest_tree(model)
    for dst in (model, model / "c", model.parent, model / "empty"):
        with pytest.raises(errors.DestinationInsideSourceError):
            archive.compress(model, dst, overwrite=True)
    (tmp_path / "c").mkdir()
    archive.compress(model, tmp_path / "c")
    with pytest.raises(errors.DestinationExistsError):
        archive.compress(model, tmp_path / "c")
    (tmp_path / "c" / "mine").write_text("old")
    archive.compress(model, tmp_path / "c", overwrite=True)
    assert not (tmp_path / "c" / "mine").exists()
    assert archive.verify(tmp_path / "c").ok
    with pytest.raises(errors.DestinationExistsError):
        archive.decompress(tmp_path / "c", model)
    archive.decompress(tmp_path / "c", tmp_path / "r" / "deep")
    assert digest_tree(model) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "model", "r"]


def test_overwrite_without_exchange(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitforbit.archive.filesystem.exchange", lambda a, b: False)
    archive.compress(model, tmp_path / "c")
    (tmp_path / "c" / "mine").write_text("old")
    archive.compress(model, tmp_path / "c", overwrite=True)
    assert archive.verify(tmp_path / "c", against=model).unknown_files == []
    staging = tmp_path / "c.bitforbit-partial"  # as if killed between the two renames
    staging.mkdir()
    (tmp_path / "c").rename(staging / "old")
    with pytest.raises(errors.DestinationExistsError):
        archive.compress(model, tmp_path / "c")
    assert archive.verify(tmp_path / "c").ok


def test_broken_source_leaves_nothing(model: Path, tmp_path: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(errors.TruncatedFileError, match=shard.name):
        archive.compress(model, tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def first(root: Path) -> Path:
    return min(root.glob("*.safetensors"))


def resign(path: Path, edit: Any) -> None:
    """Change a shard's record and its checksum, the data staying as it is."""
    header, data = split_file(path.read_bytes())
    record = json.loads(header["__metadata__"]["bitforbit"])
    edit(record)
    text = json.dumps(record)
    header["__metadata__"] |= {"bitforbit": text, "bitforbit_xxh3": checksum.xxh3_64([text.encode()])}
    raw = json.dumps(header).encode()
    path.write_bytes(with_header(raw + b" " * (-(8 + len(raw)) % 64), data))


NAME = "model.layers.0.proj.weight"


def set_tensor(key: str, value: Any) -> Any:
    return lambda record: record["tensors"][NAME].__setitem__(key, value)


def edit(root: Path, change: Any) -> None:
    resign(first(root), change)


DAMAGE: dict[str, tuple[Any, type[Exception]]] = {
    "first part": (lambda root: flip(first(root), open_shard(first(root)).header.data_start + 5000),
                   errors.ChecksumError),
    "last byte": (lambda root: flip(first(root), -1), errors.ChecksumError),
    "record": (lambda root: flip(first(root), first(root).read_bytes().index(b"sha256") + 15),
               errors.FormatError),
    "cut": (lambda root: first(root).write_bytes(first(root).read_bytes()[:-9]), errors.TruncatedFileError),
    "empty": (lambda root: first(root).write_bytes(b""), errors.TruncatedFileError),
    "gone": (lambda root: first(root).unlink(), errors.MissingPartError),
    "tokenizer gone": (lambda root: (root / "tokenizer.json").unlink(), errors.MissingPartError),
    "tokenizer changed": (lambda root: flip(root / "tokenizer.json", 3), errors.ChecksumError),
    "manifest": (lambda root: (root / "bitforbit.json").write_text("{"), errors.ManifestError),
    "shards swapped": (lambda root: shutil.copy(max(root.glob("*.safetensors")), first(root)), errors.MixedFilesError),
    "unknown codec": (lambda root: edit(root, set_tensor("codec", "later")), errors.UnsupportedVersionError),
    "newer codec": (lambda root: edit(root, set_tensor("codec_version", 9)), errors.UnsupportedVersionError),
    "other shape": (lambda root: edit(root, set_tensor("shape", [1])), errors.ManifestError),
    "other config": (lambda root: edit(root, set_tensor("config", {})), errors.BitforbitError),
    "wrong decoded": (lambda root: edit(root, set_tensor("xxh3_decoded", "0" * 16)), errors.ChecksumError),
    "part missing": (lambda root: edit(root, set_tensor("parts", {"codes": 64})), errors.MissingPartError),
    "wrong sha": (lambda root: edit(root, lambda r: r["file"].__setitem__("sha256", "0" * 64)),
                  errors.MixedFilesError),
    "wrong xxh3": (lambda root: edit(root, lambda r: r["file"].__setitem__("xxh3_128", "0" * 32)),
                   errors.ChecksumError),
    "tensor left out": (lambda root: edit(root, lambda r: r["tensors"].pop(NAME)), errors.ManifestError),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "c")
    damage, error = DAMAGE[name]
    damage(tmp_path / "c")
    with pytest.raises(error):
        archive.decompress(tmp_path / "c", tmp_path / "r", sha256=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "model"]
    report = archive.verify(tmp_path / "c")
    assert not report.ok
    assert report.errors
    assert all(issubclass(getattr(errors, failure.error), errors.BitforbitError) for failure in report.errors)


def test_checksum_error_names_file_and_tensor(model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "c")
    DAMAGE["first part"][0](tmp_path / "c")
    with pytest.raises(errors.ChecksumError, match=rf"{first(tmp_path / 'c').name}, tensor 'model\.layers\.0"):
        archive.decompress(tmp_path / "c", tmp_path / "r")


def test_verify_reports_all_failures(model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "c")
    for path in sorted((tmp_path / "c").glob("*.safetensors")):
        shard = open_shard(path)
        for name in shard.original.tensors[0].name, shard.original.tensors[2].name:
            flip(path, shard.header.data_start + shard.begin[name])
    (tmp_path / "c" / "tokenizer.json").unlink()
    (tmp_path / "c" / "new").write_text("x")
    report = archive.verify(tmp_path / "c")
    assert len([f for f in report.errors if f.tensor is not None]) == 4
    assert [f.error for f in report.errors if f.path == "tokenizer.json"] == ["MissingPartError"]
    assert report.unknown_files == ["new"]
    json.dumps(report.to_json())


def test_verify_against_another_model(model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "c")
    flip(model / "tokenizer.json", 7)
    flip(first(model), -2000)
    flip(model / "config.json", 0)
    (model / "new").write_text("x")
    (model / "README.md").unlink()
    report = archive.verify(tmp_path / "c", against=model)
    assert {f.path for f in report.errors} == {
        "tokenizer.json", first(model).name, "config.json", "new", "README.md"
    }  # fmt: skip
    assert {f.error for f in report.errors} == {"VerificationError"}
    size = first(model).stat().st_size
    assert any(f.message.endswith(f"at byte {size - 2000}") for f in report.errors)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_shards_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tmp_path = tmp_path_factory.getbasetemp() / "mutated"
    source, shard = tmp_path / "s.safetensors", tmp_path / "c.safetensors"
    if not shard.exists():
        tmp_path.mkdir(exist_ok=True)
        source.write_bytes(safetensors_bytes({"a.weight": gaussian((32, 64)), "b": gaussian((3,))}))
        archive.compress(source, shard)
    bad = bytearray(shard.read_bytes())
    header_end = open_shard(shard).header.data_start
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "bad.safetensors").write_bytes(bad)
    try:
        archive.decompress(tmp_path / "bad.safetensors", tmp_path / "r.safetensors", overwrite=True)
        assert (tmp_path / "r.safetensors").read_bytes() == source.read_bytes()
    except errors.BitforbitError:
        pass


def test_inspect_agrees_before_and_after(model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "c")
    plain, compressed = archive.inspect(model), archive.inspect(tmp_path / "c")
    assert (plain.compressed, compressed.compressed) == (False, True)
    assert plain.tensors == compressed.tensors
    assert plain.total == compressed.total
    tensor = plain.tensors[0]
    assert tensor.shannon_bound is not None
    assert tensor.bits_per_weight is not None
    assert 10 < tensor.shannon_bound < tensor.bits_per_weight
    assert archive.inspect(model, forecast=False).total.stored_bytes is None
    assert archive.inspect(first(model)).tensors == plain.tensors[:4]
    json.dumps(plain.to_json())


def test_part_names_are_those_of_the_format(tmp_path: Path) -> None:
    build_model(tmp_path / "m", shards=1)
    archive.compress(tmp_path / "m", tmp_path / "c")
    shard = open_shard(first(tmp_path / "c"))
    assert shard.stored_names(NAME) == [part_name(NAME, p) for p in shard.record.tensors[NAME].parts]


@pytest.mark.parametrize(("rows", "error"), [(1 << 36, errors.ManifestError), (128, errors.CorruptTensorError)])
def test_a_record_that_claims_too_much(tmp_path: Path, rows: int, error: type[errors.FormatError]) -> None:
    """A shard whose record describes more than its parts can hold is refused before anything is allocated."""
    source, shard = tmp_path / "model.safetensors", tmp_path / "packed.safetensors"
    source.write_bytes(safetensors_bytes({"w": gaussian((64, 64))}))
    archive.compress(source, shard)
    header = read_header(shard)
    record = json.loads(header.metadata["bitforbit"])
    text = json.dumps({"w": {"dtype": "BF16", "shape": [rows, 64], "data_offsets": [0, rows * 128]}}).encode()
    record["file"] |= {
        "size": 8 + len(text) + rows * 128,
        "header_size": len(text),
        "header": base64.b64encode(zlib.compress(text)).decode(),
    }
    record["tensors"]["w"] |= {"shape": [rows, 64]}
    record["tensors"]["w"]["config"] |= {"rows": rows}
    metadata = {"bitforbit": json.dumps(record)}
    metadata["bitforbit_xxh3"] = checksum.xxh3_64([metadata["bitforbit"].encode()])
    hostile = tmp_path / "hostile.safetensors"
    hostile.write_bytes(build_header(header.tensors, metadata) + shard.read_bytes()[header.data_start :])
    with pytest.raises(error, match=r"expected|cannot"):
        archive.decompress(hostile, tmp_path / "restored.safetensors")
    assert not (tmp_path / "restored.safetensors").exists()
