"""DFloat11 directories that are damaged, hostile or not what they seem, and what is derived from names and configs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bitforbit.archive.dfloat11 import Df11Directory, read_directory, write_directory, write_plain
from bitforbit.archive.dfloat11.patterns import fullmatch
from bitforbit.archive.dfloat11.shapes import ShapeSource
from bitforbit.archive.dfloat11.stfile import TensorEntry
from bitforbit.archive.dfloat11.units import derive_units
from bitforbit.errors import (
    BitforbitError,
    Df11FormatError,
    Df11ShapeError,
    DuplicateKeyError,
    GgufRefusedError,
    MissingPartError,
    NotCompressedError,
    PickleRefusedError,
    SourceNotFoundError,
    TruncatedFileError,
)

GOLDEN = Path(__file__).parent.parent / "data" / "df11-official"


@pytest.fixture
def df11(tmp_path: Path) -> Path:
    """A copy of a directory that the reference compressor wrote."""
    return shutil.copytree(GOLDEN / "llama_dir" / "df11", tmp_path / "df11")


def edit_config(directory: Path, **members: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["dfloat11_config"] |= members
    path.write_text(json.dumps(config))


def test_sources_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        read_directory(tmp_path / "nothing")
    for name, error in [
        ("readme.md", SourceNotFoundError),
        ("layer_0.pkl", PickleRefusedError),
        ("pytorch_model.bin", PickleRefusedError),
        ("model.gguf", GgufRefusedError),
    ]:
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).write_bytes(b"x")
        with pytest.raises(error):
            read_directory(directory)
        with pytest.raises(error):
            write_directory(directory, tmp_path)
    with pytest.raises(NotCompressedError):
        read_directory(GOLDEN / "llama_dir" / "bf16")


def test_missing_part(df11: Path) -> None:
    path = df11 / "lm_head.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.gaps"]
    save_file(tensors, path)
    with pytest.raises(MissingPartError, match="gaps"):
        read_directory(df11)


def test_a_tensor_twice(df11: Path) -> None:
    shutil.copyfile(df11 / "lm_head.safetensors", df11 / "other.safetensors")
    with pytest.raises(DuplicateKeyError):
        read_directory(df11)


def test_a_matrix_that_is_also_stored_plainly(df11: Path) -> None:
    save_file({"lm_head.weight": np.zeros((1, 1), np.float16)}, df11 / "other.safetensors")
    with pytest.raises(DuplicateKeyError):
        read_directory(df11)


def test_truncated_file(df11: Path) -> None:
    path = df11 / "lm_head.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedFileError):
        read_directory(df11)


@pytest.mark.parametrize("suffix", ["luts", "gaps", "split_positions"])
def test_part_of_another_dtype(df11: Path, suffix: str) -> None:
    path = df11 / "lm_head.safetensors"
    tensors = load_file(path)
    tensors[f"lm_head.{suffix}"] = tensors[f"lm_head.{suffix}"].astype(np.int32)
    save_file(tensors, path)
    with pytest.raises(Df11FormatError):
        list(read_directory(df11))


@pytest.mark.parametrize(
    "members",
    [
        {"threads_per_block": [256]},
        {"bytes_per_thread": 4},
        {"pattern_dict": {}},
        {"pattern_dict": []},
        {"pattern_dict": {"a": 1}},
        {"pattern_dict": {r"model\.layers\.\d+": ["a", "b"], "lm_head": []}},
        {"pattern_dict": {r"model\.layers\.\d+": ["a"] * 7, "lm_head": []}},
        {"pattern_dict": {r"(?=x)": []}},
    ],
)
def test_configs_that_do_not_fit(df11: Path, members: dict[str, object]) -> None:
    edit_config(df11, **members)
    with pytest.raises(Df11FormatError):
        read_directory(df11)


def test_a_config_that_is_missing_can_be_stated(df11: Path) -> None:
    patterns = json.loads((df11 / "config.json").read_text())["dfloat11_config"]["pattern_dict"]
    (df11 / "config.json").unlink()
    with pytest.raises(Df11FormatError, match="state the units"):
        read_directory(df11)
    original = load_file(GOLDEN / "llama_dir" / "bf16" / "model.safetensors")
    restored = {t.name: (t.shape, bytes(t.data)) for t in read_directory(df11, units=patterns)}
    assert restored == {name: (array.shape, array.tobytes()) for name, array in original.items()}


def test_damage_in_the_stream_names_the_unit(df11: Path) -> None:
    path = df11 / "model_layers_1.safetensors"
    data = bytearray(path.read_bytes())
    data[2000:2100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(Df11FormatError, match=r"model\.layers\.1.*model_layers_1"):
        list(read_directory(df11))


def test_random_damage_never_crashes(df11: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = df11 / "lm_head.safetensors"
    good = path.read_bytes()
    for round_number in range(200):
        data = bytearray(good)
        for at in rng.integers(0, 600 if round_number % 2 else len(data), rng.integers(1, 5)):
            data[at] ^= rng.integers(1, 256)
        path.write_bytes(data)
        try:
            for tensor in read_directory(df11):
                assert tensor.data.nbytes == 2 * int(np.prod(tensor.shape))
        except BitforbitError:
            continue


def test_shapes_from_norms_alone(df11: Path) -> None:
    config = json.loads((df11 / "config.json").read_text())
    (df11 / "config.json").write_text(json.dumps({"dfloat11_config": config["dfloat11_config"]}))
    original = load_file(GOLDEN / "llama_dir" / "bf16" / "model.safetensors")
    assert {t.name: t.shape for t in Df11Directory(df11).tensors} == {n: a.shape for n, a in original.items()}


def test_shapes_that_disagree(df11: Path) -> None:
    path = df11 / "config.json"
    good = json.loads(path.read_text())
    for members in ({"hidden_size": 64}, {"vocab_size": 1000}):
        path.write_text(json.dumps(good | members))
        with pytest.raises(Df11ShapeError, match="disagree"):
            read_directory(df11)


def test_shapes_that_are_stated(df11: Path, tmp_path: Path) -> None:
    with pytest.raises(Df11ShapeError, match="stated"):
        read_directory(df11, shapes={"lm_head.weight": (999, 127)})
    shapes = {t.name: t.shape for t in Df11Directory(df11, shapes={"lm_head.weight": (128, 999)}).tensors}
    assert shapes["lm_head.weight"] == (128, 999)
    (tmp_path / "out").mkdir()
    write_plain(df11, tmp_path / "out", shapes={"lm_head.weight": (128, 999)})


def test_shapes_of_modules_that_are_not_known() -> None:
    source = ShapeSource({"blocks.0.to_q.bias": (6,), "blocks.0.norm1.weight": (4,)}, {}, {})
    assert source.shapes("blocks.0", ["blocks.0.to_q.weight"], [24]) == [(6, 4)]
    assert source.shapes("blocks.0", ["blocks.0.down_proj.weight"], [24]) == [(4, 6)]
    with pytest.raises(Df11ShapeError, match="shapes="):
        source.shapes("blocks.0", ["blocks.0.to_k.weight"], [24])
    with pytest.raises(Df11ShapeError):
        source.shapes("blocks.0", ["blocks.0.to_q.weight"], [25])
    nested = ShapeSource({}, {"text_config": {"hidden_size": 8}}, {})
    assert nested.shapes("model.layers.0", ["model.layers.0.q_proj.weight"], [24]) == [(3, 8)]
    with pytest.raises(Df11ShapeError, match="gate_proj"):
        nested.shapes("x", ["x.gate_proj.weight", "x.up_proj.weight"], [16, 24])


def entry(name: str, shape: tuple[int, ...] = (2, 2), dtype: str = "BF16") -> TensorEntry:
    return TensorEntry(name, dtype, shape, 0, 8)


def test_units_from_names() -> None:
    plan = derive_units(
        [
            entry("lm_head.weight"),
            entry("model.layers.0.mlp.b.weight"),
            entry("model.layers.0.mlp.down_proj.weight"),
            entry("model.layers.0.mlp.a.weight"),
            entry("model.layers.0.mlp.gate.weight"),
            entry("model.layers.0.self_attn.q_proj.weight"),
            entry("model.layers.0.self_attn.q_proj.bias", (2,)),
            entry("model.layers.0.mlp.experts.w.weight", (2, 2, 2)),
            entry("model.layers.0.self_attn.f32.weight", dtype="F32"),
            entry("model.layers.0.input_layernorm.weight", (2,)),
            entry("model.layers.1.self_attn.q_proj.weight"),
            entry("model.layers.10.self_attn.q_proj.weight"),
            entry("model.layers.2.input_layernorm.weight", (2,)),
            entry("transformer.h.0.fc.weight"),
            entry("model.embed_tokens.weight"),
            entry("score.weight"),
        ]
    )
    assert [unit.name for unit in plan.units] == [
        "model.embed_tokens", "lm_head", "model.layers.0", "model.layers.1", "model.layers.10", "transformer.h.0",
    ]  # fmt: skip
    assert plan.pattern_dict == {
        r"model\.embed_tokens": [],
        "lm_head": [],
        r"model\.layers\.(?:0)": ["self_attn.q_proj", "mlp.down_proj", "mlp.b", "mlp.a"],
        r"model\.layers\.(?:1|10)": ["self_attn.q_proj"],
        r"transformer\.h\.\d+": ["fc"],
    }
    for unit in plan.units:
        assert sum(fullmatch(pattern, unit.name) for pattern in plan.pattern_dict) == 1


ATOMS = st.sampled_from(["a", "b", r"\.", ".", r"\d", r"\w", "[ab]", "[^a]", "[0-9x]", "(a|b1)", "(?:a+|b)*", "(a|)"])
PATTERNS = st.lists(st.tuples(ATOMS, st.sampled_from(["", "", "*", "+", "?"])), max_size=6).map(
    lambda parts: "".join(atom if atom.endswith("*") else atom + mark for atom, mark in parts)
)


@given(st.lists(PATTERNS, min_size=1, max_size=2).map("|".join), st.text("ab1.x_", max_size=10))
def test_patterns_match_as_regular_expressions_do(pattern: str, name: str) -> None:
    assert fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)


def test_patterns_take_bounded_time() -> None:
    for pattern in ("(a+)+b", "(a*)*" * 10 + "b", "((((((a*)*)*)*)*)*)b", r"\w*" * 100 + "b"):
        assert not fullmatch(pattern, "a" * 300)


@pytest.mark.parametrize(
    "pattern", ["(", ")", "a)", "[", "[a", "*", "a**", "a{2}", "^a", "a$", r"\b", "(?=a)", "\\", "(" * 50]
)
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(Df11FormatError):
        fullmatch(pattern, "a")
