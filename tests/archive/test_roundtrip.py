"""Compress and decompress give back the same files, whatever the directory looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitforbit import archive, errors
from bitforbit.dtypes import SAFETENSORS_BITS
from bitforbit.format.layout import open_shard
from helpers import assert_bitwise_equal, assert_same_tree, digest_tree
from helpers.models import Tensor, build_model, gaussian, noise, safetensors_bytes, split_file, with_header


def round_trip(src: Path, tmp_path: Path, **options: Any) -> Path:
    """Compress, verify against the source, decompress, compare; the source stays as it was. Returns the compressed."""
    before = digest_tree(src)
    archive.compress(src, tmp_path / "compressed", **options)
    report = archive.verify(tmp_path / "compressed", against=src)
    assert report.ok, report.errors
    archive.decompress(tmp_path / "compressed", tmp_path / "restored")
    assert digest_tree(src) == before
    return tmp_path / "compressed"


def one_shard(root: Path, data: bytes) -> Path:
    root.mkdir()
    (root / "model.safetensors").write_bytes(data)
    return root


def test_sharded(model: Path, tmp_path: Path) -> None:
    compressed = round_trip(model, tmp_path)
    assert_same_tree(tmp_path / "restored", model)
    config = json.loads((compressed / "config.json").read_text())
    assert list(config) == ["model_type", "hidden_size", "quantization_config"]
    assert config["quantization_config"] == {"quant_method": "bitforbit", "format_version": 1, "codec": "planes"}
    index = json.loads((compressed / "model.safetensors.index.json").read_text())
    stored: dict[str, str] = {}
    total = 0
    for shard in sorted(compressed.glob("*.safetensors")):
        header, data = split_file(shard.read_bytes())
        header.pop("__metadata__")
        stored |= dict.fromkeys(header, shard.name)
        total += len(data)
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == total


def test_report_counts(model: Path, tmp_path: Path) -> None:
    report = archive.compress(model, tmp_path / "c")
    shards = [open_shard(path) for path in sorted((tmp_path / "c").glob("*.safetensors"))]
    assert (report.shards, report.tensors, report.compressed_tensors) == (2, 8, 4)
    assert report.original_bytes == sum(p.stat().st_size for p in model.rglob("*") if p.is_file())
    assert report.compressed_bytes == sum(p.stat().st_size for p in (tmp_path / "c").rglob("*") if p.is_file())
    assert report.weight_compressed_bytes == sum(s.header.file_size - s.header.data_start for s in shards)
    assert report.bits_per_weight == 8 * report.weight_compressed_bytes / report.elements
    json.dumps(report.to_json())


def test_shards_open_with_safetensors_and_parts_are_aligned(model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "c")
    for path in sorted((tmp_path / "c").glob("*.safetensors")):
        shard = open_shard(path)
        assert shard.header.data_start % 64 == 0
        coded = 0
        with safetensors.safe_open(path, framework="numpy") as opened:
            assert opened.metadata()["format"] == "pt"
            for entry in shard.header.tensors:
                if "__" in entry.name:
                    coded += 1
                    assert entry.begin % 64 == 0
                    assert entry.nbytes % 64 == 0
                    assert opened.get_tensor(entry.name).dtype == np.uint8
        assert coded


def test_output_is_deterministic(model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "a", threads=1)
    archive.compress(model, tmp_path / "b", threads=4)
    assert_same_tree(tmp_path / "b", tmp_path / "a")


def test_single_file(tmp_path: Path) -> None:
    src = tmp_path / "lora.safetensors"
    src.write_bytes(safetensors_bytes({"a.weight": gaussian((64, 128))}, {"rank": "64"}))
    archive.compress(src, tmp_path / "c.safetensors")
    assert archive.verify(tmp_path / "c.safetensors", against=src).ok
    assert (tmp_path / "c.safetensors").stat().st_size < src.stat().st_size
    archive.decompress(tmp_path / "c.safetensors", tmp_path / "r.safetensors")
    assert_bitwise_equal((tmp_path / "r.safetensors").read_bytes(), src.read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.safetensors", "lora.safetensors", "r.safetensors"]


def every_dtype() -> dict[str, Tensor]:
    shapes = [(), (1,), (0,), (3, 0, 5), (2, 4), (63,), (64,), (65,), (2, 3, 4, 2), (16, 64), (40, 130)]
    tensors = {}
    for dtype, bits in SAFETENSORS_BITS.items():
        for i, shape in enumerate(shapes):
            if bits * int(np.prod(shape)) % 8 == 0:
                tensors[f"{dtype}.{i}"] = noise(dtype, shape, i)
    return tensors


def test_every_dtype_and_rank(tmp_path: Path) -> None:
    src = one_shard(tmp_path / "m", safetensors_bytes(every_dtype()))
    round_trip(src, tmp_path)
    assert_same_tree(tmp_path / "restored", src)


def special(dtype: str, words: list[int], count: int = 4096) -> Tensor:
    kind = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}[dtype]
    return dtype, (count,), np.resize(np.array(words, kind), count).tobytes()


def test_special_values(tmp_path: Path) -> None:
    tensors = {
        "zeros": ("BF16", (64, 64), bytes(8192)),
        "constant": special("BF16", [0x3F80]),
        "nan": special("BF16", [0x7FC1, 0xFFFF, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x807F]),
        "all": ("BF16", (256, 256), np.arange(65536, dtype=np.uint16).tobytes()),
        "all.f16": ("F16", (65536,), np.arange(65536, dtype=np.uint16).tobytes()),
        "upcast": special("F32", [0x3F800000, 0xBF910000, 0x7FC10000]),
        "f32": gaussian((64, 64), dtype="F32"),
        "fp8": gaussian((64, 128), dtype="F8_E4M3"),
    }
    src = one_shard(tmp_path / "m", safetensors_bytes(tensors))
    round_trip(src, tmp_path)
    assert_same_tree(tmp_path / "restored", src)


def test_strange_header(tmp_path: Path) -> None:
    weights = gaussian((64, 64))[2]
    text = (
        '  {"b" : {"extra":[1], "data_offsets":[ 8192,16384],"shape":[64 ,64],"dtype":"BF16"},\n\t'
        '"\\u00e4.w":{"dtype":"BF16","shape":[64,64],"data_offsets":[0,8192]},"__metadata__":{"z":"\\n","a":""}}   \n'
    )
    src = one_shard(tmp_path / "m", with_header(text.encode(), weights + weights[::-1]))
    compressed = round_trip(src, tmp_path)
    assert_same_tree(tmp_path / "restored", src)
    header, _ = split_file((compressed / "model.safetensors").read_bytes())
    assert (header["__metadata__"]["z"], header["__metadata__"]["format"]) == ("\n", "pt")


def test_names_without_dots_in_unicode_and_colliding(tmp_path: Path) -> None:
    names = [
        "weight",
        "",
        ".",
        "a.",
        "ä.ß.権重",
        '"quoted"\\',
        "a\n.b",
        "x" * 3000,
        "a.b.weight",
        "__weight",
        "a.code__b",
    ]
    tensors = {name: gaussian((48, 64), i) for i, name in enumerate(names)}
    tensors["c.weight"] = gaussian((48, 64))
    tensors["c.code__weight"] = noise("U8", (5,))
    src = one_shard(tmp_path / "m", safetensors_bytes(tensors))
    compressed = round_trip(src, tmp_path)
    assert_same_tree(tmp_path / "restored", src)
    record = open_shard(compressed / "model.safetensors").record
    assert record.tensors["c.weight"].is_raw
    assert not record.tensors["weight"].is_raw
    with safetensors.safe_open(compressed / "model.safetensors", framework="numpy") as opened:
        assert len(opened.keys()) > len(tensors)


@pytest.mark.parametrize(
    "data", [with_header(b"{}", b""), safetensors_bytes({"e": noise("BF16", (0,))}, {"format": "np"})]
)
def test_nothing_to_compress(data: bytes, tmp_path: Path) -> None:
    src = one_shard(tmp_path / "m", data)
    (src / "config.json").write_text("{}")
    compressed = round_trip(src, tmp_path)
    assert_same_tree(tmp_path / "restored", src)
    assert (compressed / "config.json").read_text() == "{}"


def test_many_tiny_tensors(tmp_path: Path) -> None:
    tensors = {f"block.{i}.bias": gaussian((i % 50,), i) for i in range(3000)}
    src = one_shard(tmp_path / "m", safetensors_bytes(tensors))
    compressed = round_trip(src, tmp_path)
    assert_same_tree(tmp_path / "restored", src)
    waste = open_shard(compressed / "model.safetensors").header.raw_json
    assert len(waste) - len(waste.rstrip()) < 64 + (compressed / "model.safetensors").stat().st_size // 1000


def test_include_and_exclude(model: Path, tmp_path: Path) -> None:
    archive.compress(model, tmp_path / "c", include=["*.weight"], exclude=["*.mlp.*"])
    raw = {
        name: record.is_raw
        for path in (tmp_path / "c").glob("*.safetensors")
        for name, record in open_shard(path).record.tensors.items()
    }
    assert not raw["model.layers.0.proj.weight"]
    assert raw["model.layers.0.mlp.weight"]
    assert archive.verify(tmp_path / "c", against=model).ok
    with pytest.raises(errors.UsageError):
        archive.compress(model, tmp_path / "d", include="*.weight")


def test_hugging_face_cache(tmp_path: Path) -> None:
    real = build_model(tmp_path / "real")
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(p for p in real.iterdir() if p.is_file())):
        path.rename(repo / "blobs" / f"blob{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{i}")
    round_trip(snapshot, tmp_path)
    assert_same_tree(tmp_path / "restored", snapshot)
    assert not any(p.is_symlink() for p in (tmp_path / "restored").rglob("*"))
    (repo / "blobs" / "blob0").unlink()
    with pytest.raises(errors.SourceNotFoundError, match="symbolic link"):
        archive.compress(snapshot, tmp_path / "x")


def test_symlink_loop(model: Path, tmp_path: Path) -> None:
    (model / "loop").symlink_to(model)
    with pytest.raises(errors.UsageError, match="leads back"):
        archive.compress(model, tmp_path / "c")


def test_read_only_source(model: Path, tmp_path: Path) -> None:
    directories = [model, *(p for p in model.rglob("*") if p.is_dir())]
    for path in model.rglob("*"):
        path.chmod(0o444 if path.is_file() else 0o555)
    model.chmod(0o555)
    try:
        round_trip(model, tmp_path)
        assert_same_tree(tmp_path / "restored", model)
    finally:
        for path in directories:
            path.chmod(0o755)


def test_diffusers_pipeline(tmp_path: Path) -> None:
    root = build_model(tmp_path / "pipe")
    (root / "config.json").rename(root / "model_index.json")
    build_model(root / "unet" / "nested")
    (root / "vae").mkdir()
    (root / "vae" / "config.json").write_text('{"quantization_config": {"quant_method": "x"}, "t": [0.0, Infinity]}')
    (root / "vae" / "diffusion.safetensors").write_bytes(safetensors_bytes({"w": gaussian((64, 64))}))
    (root / "scheduler").mkdir()
    (root / "scheduler" / "config.json").write_text("{}")
    compressed = round_trip(root, tmp_path)
    assert_same_tree(tmp_path / "restored", root)
    for name in ("config.json", "diffusion.safetensors"):  # a component that is quantized already stays as it is
        assert (compressed / "vae" / name).read_bytes() == (root / "vae" / name).read_bytes()
    assert (compressed / "scheduler" / "config.json").read_text() == "{}"
    nested = json.loads((compressed / "unet" / "nested" / "config.json").read_text())
    assert nested["quantization_config"]["quant_method"] == "bitforbit"


def test_a_model_with_a_quantization_of_its_own(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "x"}}')
    compressed = round_trip(model, tmp_path)
    config = json.loads((compressed / "config.json").read_text())
    assert config["quantization_config"]["base"] == {"quant_method": "x"}
    assert_same_tree(tmp_path / "restored", model)


def test_pickles_are_carried_and_caches_skipped(model: Path, tmp_path: Path) -> None:
    (model / "training_args.bin").write_bytes(b"\x80\x04.")
    (model / "broken.json").write_text("{")
    (model / "other.safetensors.index.json").write_text("[]")
    for skipped in (".git", ".cache/huggingface/download"):
        (model / skipped).mkdir(parents=True)
        (model / skipped / "x").write_text("x")
    compressed = round_trip(model, tmp_path)
    assert (compressed / "training_args.bin").read_bytes() == b"\x80\x04."
    assert not (compressed / ".git").exists()
    assert not (compressed / ".cache").exists()
    assert (tmp_path / "restored" / "other.safetensors.index.json").read_text() == "[]"


@pytest.mark.parametrize("config", ["[1]", "{", "\ufeff{}", '{"a":1e400}'])
def test_odd_configs(config: str, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(config)
    round_trip(model, tmp_path)
    assert_same_tree(tmp_path / "restored", model)


def test_progress_adds_up(model: Path, tmp_path: Path) -> None:
    class Count:
        total = done = finished = 0

        def start(self, total_bytes: int, description: str) -> None:
            self.total += total_bytes

        def advance(self, nbytes: int) -> None:
            self.done += nbytes

        def finish(self) -> None:
            self.finished += 1

    for run in (
        lambda c: archive.compress(model, tmp_path / "c", progress=c),
        lambda c: archive.decompress(tmp_path / "c", tmp_path / "r", progress=c),
        lambda c: archive.verify(tmp_path / "c", progress=c),
        lambda c: archive.inspect(tmp_path / "c", progress=c),
        lambda c: archive.inspect(model, progress=c),
    ):
        count = Count()
        run(count)
        assert count.finished == 1
        assert 0 < count.done <= count.total
        assert count.done > 0.9 * count.total


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(SAFETENSORS_BITS)), st.lists(st.integers(0, 40), max_size=3), st.booleans()),
        max_size=6,
    )
)
def test_any_file(tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[str, list[int], bool]]) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    tensors = {}
    for name, (dtype, shape, zero) in content.items():
        if SAFETENSORS_BITS[dtype] % 8 == 0:
            made = noise(dtype, tuple(shape))
            tensors[name] = (dtype, tuple(shape), bytes(len(made[2])) if zero else made[2])
    src = tmp_path / "a.safetensors"
    src.write_bytes(safetensors_bytes(tensors))
    archive.compress(src, tmp_path / "b.safetensors")
    archive.decompress(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert_bitwise_equal((tmp_path / "c.safetensors").read_bytes(), src.read_bytes())
