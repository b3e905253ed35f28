"""DFloat11 directories: those of the reference compressor both ways, and models made here."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save, save_file

from bitforbit.archive.dfloat11 import Df11Directory, load_units_file, read_directory, write_directory, write_plain
from bitforbit.archive.dfloat11.stfile import library_layout, open_directory
from bitforbit.codecs.df11 import Df11Unit, decode_unit, naive
from bitforbit.errors import AlreadyCompressedError, Df11UnrepresentableError, UsageError

GOLDEN = Path(__file__).parent.parent / "data" / "df11-official"
LAYOUTS = [("llama_dir", False), ("llama_single", True)]
Tensors = dict[str, npt.NDArray[np.generic]]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def fresh(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def bf16(*shape: int, seed: int = 0) -> npt.NDArray[np.generic]:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * 0.02
    return values.astype(ml_dtypes.bfloat16)


def model(layers: int = 2, hidden: int = 8, vocab: int = 13) -> Tensors:
    tensors: Tensors = {
        "lm_head.weight": bf16(vocab, hidden, seed=1),
        "model.embed_tokens.weight": bf16(vocab, hidden, seed=2),
        "model.norm.weight": bf16(hidden),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": bf16(hidden),
            f"{prefix}.self_attn.q_proj.weight": bf16(12, hidden, seed=3),
            f"{prefix}.self_attn.q_proj.bias": bf16(12, seed=4),
            f"{prefix}.self_attn.o_proj.weight": bf16(hidden, 12, seed=5),
            f"{prefix}.mlp.down_proj.weight": bf16(hidden, 20, seed=6),
            f"{prefix}.mlp.up_proj.weight": bf16(20, hidden, seed=7),
            f"{prefix}.mlp.gate_proj.weight": bf16(20, hidden, seed=8),
        }
    return tensors


def save_model(path: Path, tensors: Tensors, **config: object) -> Path:
    fresh(path)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"hidden_size": 8, **config}, indent=2) + "\n")
    return path


def assert_restored(directory: Path, tensors: Tensors, **options: object) -> None:
    restored = {t.name: (t.shape, bytes(t.data)) for t in read_directory(directory, **options)}  # type: ignore[arg-type]
    assert restored == {name: (array.shape, array.tobytes()) for name, array in tensors.items()}


@pytest.mark.parametrize(("name", "single_file"), LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_golden_files_are_written_byte_for_byte(name: str, single_file: bool, threads: int, tmp_path: Path) -> None:
    done: list[int] = []
    write_directory(GOLDEN / name / "bf16", tmp_path, single_file=single_file, threads=threads, progress=done.append)
    written = contents(tmp_path)
    expected = contents(GOLDEN / name / "df11")
    if single_file:  # the reference leaves the other files out
        del written["generation_config.json"]
    assert written == expected
    assert sum(done) == sum(a.nbytes for a in load_file(GOLDEN / name / "bf16" / "model.safetensors").values())


@pytest.mark.parametrize(("name", "single_file"), LAYOUTS)
def test_golden_files_become_the_original_files(name: str, single_file: bool, tmp_path: Path) -> None:
    write_plain(GOLDEN / name / "df11", tmp_path, threads=2)
    written = contents(tmp_path)
    expected = contents(GOLDEN / name / "bf16")
    if single_file:  # they lack the model's config
        expected = {"model.safetensors": expected["model.safetensors"]}
    assert written == expected


@pytest.mark.parametrize(("name", "single_file"), LAYOUTS)
def test_golden_units_against_the_reference_decoder(name: str, single_file: bool) -> None:
    stored = open_directory(GOLDEN / name / "df11")
    for key in [key for key in stored if key.endswith(".luts")]:
        unit_name = key.removesuffix(".luts")

        def part(suffix: str, unit_name: str = unit_name) -> npt.NDArray[np.uint8]:
            return np.asarray(stored[f"{unit_name}.{suffix}"].map())

        unit = Df11Unit(
            luts=part("luts").reshape(-1, 256),
            encoded_exponent=part("encoded_exponent"),
            sign_mantissa=part("sign_mantissa"),
            output_positions=part("output_positions"),
            gaps=part("gaps"),
            split_positions=part("split_positions").view(np.int64),
        )
        np.testing.assert_array_equal(naive.decode_unit(unit), decode_unit(unit))


@pytest.mark.parametrize("single_file", [False, True])
def test_round_trip_of_everything_in_a_directory(single_file: bool, tmp_path: Path) -> None:
    tensors = model(layers=11) | {"model.layers.0.mlp.experts.up": bf16(2, 3, 4), "model.rope": np.arange(3.0)}
    src = save_model(tmp_path / "src", tensors, vocab_size=13)
    (src / "tokenizer").mkdir()
    (src / "tokenizer" / "vocab.txt").write_text("a b")
    dst = fresh(tmp_path / "dst")
    write_directory(src, dst, single_file=single_file)
    assert (dst / "tokenizer" / "vocab.txt").read_text() == "a b"
    assert not list(dst.glob(".*"))
    assert_restored(dst, tensors)
    directory = Df11Directory(dst)
    assert [t.name for t in directory.tensors] == [t.name for t in directory]
    plain = fresh(tmp_path / "plain")
    write_plain(dst, plain)
    assert (plain / "model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()
    assert single_file or (plain / "config.json").read_text() != ""


def test_several_shards(tmp_path: Path) -> None:
    tensors = model(layers=3)
    src = save_model(tmp_path / "src", tensors)
    dst, plain = fresh(tmp_path / "dst"), fresh(tmp_path / "plain")
    write_directory(src, dst)
    write_plain(dst, plain, shard_bytes=1000)
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for name, file_name in index["weight_map"].items():
        assert load_file(plain / file_name)[name].tobytes() == tensors[name].tobytes()
    assert len(set(index["weight_map"].values())) == len(list(plain.glob("*.safetensors"))) > 2


def test_a_sharded_source(tmp_path: Path) -> None:
    tensors = model()
    src = save_model(tmp_path / "src", {k: v for k, v in tensors.items() if "q_proj" in k})
    save_file({k: v for k, v in tensors.items() if "q_proj" not in k}, src / "other.safetensors")
    (src / "model.safetensors.index.json").write_text("{}")
    dst = fresh(tmp_path / "dst")
    write_directory(src, dst)
    assert not (dst / "model.safetensors.index.json").exists()
    assert_restored(dst, tensors)


@pytest.mark.parametrize("single_file", [False, True])
def test_a_tied_head_is_left_out(single_file: bool, tmp_path: Path) -> None:
    tensors = model()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    src = save_model(tmp_path / "src", tensors, tie_word_embeddings=True)
    dst = fresh(tmp_path / "dst")
    write_directory(src, dst, single_file=single_file)
    del tensors["lm_head.weight"]
    assert_restored(dst, tensors)


def test_a_head_that_differs_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    src = save_model(tmp_path / "src", model(), tie_word_embeddings=True)
    dst = fresh(tmp_path / "dst")
    write_directory(src, dst)
    assert_restored(dst, model())


def test_units_of_the_user(tmp_path: Path) -> None:
    src = save_model(tmp_path / "src", model())
    dst = fresh(tmp_path / "dst")
    file = tmp_path / "units.json"
    file.write_text(json.dumps({r"model\.layers\.[01]": ["mlp.up_proj"], "lm_head": []}))
    units = load_units_file(file)
    write_directory(src, dst, units=units)
    assert json.loads((dst / "config.json").read_text())["dfloat11_config"]["pattern_dict"] == units
    names = {path.name for path in dst.glob("*.safetensors")}
    assert names == {"lm_head.safetensors", *(f"model_layers_{i}.safetensors" for i in (0, 1)), "model.safetensors"}
    assert_restored(dst, model())


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"nothing": []}, "matches no module"),
        ({"lm_head": ["x"]}, "not in the checkpoint"),
        ({r"model\.norm": []}, "BF16 matrix"),
        ({"lm_head": [], "lm_hea.": []}, "every weight has one unit"),
    ],
)
def test_units_that_do_not_fit(units: dict[str, list[str]], message: str, tmp_path: Path) -> None:
    src = save_model(tmp_path / "src", model())
    with pytest.raises(UsageError, match=message):
        write_directory(src, fresh(tmp_path / "dst"), units=units)


@pytest.mark.parametrize("text", ["[]", '{"a": "b"}', '{"a": [1]}', "{", "[" * 100000])
def test_units_files_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "units.json"
    path.write_text(text)
    with pytest.raises(UsageError):
        load_units_file(path)


def test_what_cannot_be_compressed(tmp_path: Path) -> None:
    infinite = model()
    infinite["model.layers.1.mlp.up_proj.weight"] = np.full((20, 8), np.inf, ml_dtypes.bfloat16)
    with pytest.raises(Df11UnrepresentableError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        write_directory(save_model(tmp_path / "inf", infinite), fresh(tmp_path / "a"))
    with pytest.raises(UsageError, match="native format"):
        write_directory(save_model(tmp_path / "none", {"x": np.zeros(3)}), fresh(tmp_path / "b"))
    with pytest.raises(AlreadyCompressedError):
        write_directory(GOLDEN / "llama_dir" / "df11", fresh(tmp_path / "c"))
    again = save_model(tmp_path / "ours", model(), quantization_config={"quant_method": "bitforbit"})
    with pytest.raises(AlreadyCompressedError):
        write_directory(again, fresh(tmp_path / "d"))


def test_files_are_laid_out_as_by_the_library() -> None:
    dtypes = [np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.float16, np.int32, np.uint32, np.float32, np.float64]
    dtypes += [np.int64, np.uint64, np.complex64, ml_dtypes.bfloat16]
    names = {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "F16": "f2", "I32": "i4", "U32": "u4"}
    names |= {"F32": "f4", "F64": "f8", "I64": "i8", "U64": "u8", "C64": "c8"}
    by_dtype = {np.dtype(code): name for name, code in names.items()} | {np.dtype(ml_dtypes.bfloat16): "BF16"}
    odd = ["é", 'q"\\/', "a\n\x01", "\u2028", "𝄞", "\uffff", "B", "a", "\x7f"]
    tensors = {f"{odd[i % len(odd)]}{i}": np.zeros((i % 3, 2), dtype) for i, dtype in enumerate(dtypes * 2)}
    for metadata in (None, {"format": "pt"}):
        header, entries = library_layout(
            ((name, by_dtype[array.dtype], array.shape) for name, array in tensors.items()), metadata
        )
        assert header + b"\0" * entries[-1].end == save(tensors, metadata)
