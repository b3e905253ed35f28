"""save_pretrained: shards, variants, what else is in the directory, and models that were compressed after loading."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import bitforbit
from bitforbit import BitforbitConfig, errors
from bitforbit.nn import Compressed
from integrations import zoo
from integrations.conftest import Directories


def assert_same_tensors(expected: Path, got: Path) -> None:
    a, b = ({k: v for p in d.glob("*.safetensors") for k, v in load_file(p).items()} for d in (expected, got))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
@pytest.mark.parametrize("way", ["native", "compressed while loading", "compressed afterwards"])
def test_sharded(name: str, way: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    auto = tf.AutoModelForCausalLM
    if way == "native":
        model = auto.from_pretrained(native)
    elif way == "compressed while loading":
        model = auto.from_pretrained(plain, quantization_config=BitforbitConfig())
    else:
        model = bitforbit.compress_model(auto.from_pretrained(plain))
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    auto.from_pretrained(plain).save_pretrained(tmp_path / "expected", max_shard_size="200KB")
    assert bitforbit.verify(tmp_path / "saved").ok
    bitforbit.decompress(tmp_path / "saved", tmp_path / "restored")
    if name == "mixtral":  # transformers keeps experts in one shard that are views of one tensor, however large it gets
        assert_same_tensors(tmp_path / "expected", tmp_path / "restored")
        assert all(path.stat().st_size < 220_000 for path in (tmp_path / "restored").glob("*.safetensors"))
    else:
        expected = {p.name: p.read_bytes() for p in (tmp_path / "expected").iterdir()}
        assert {p.name: p.read_bytes() for p in (tmp_path / "restored").iterdir()} == expected
    again = auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(zoo.logits(again, name, 1), zoo.logits(auto.from_pretrained(plain), name, 1))


def test_the_same_files_as_compress_makes(directories: Directories, tmp_path: Path) -> None:
    _, native = directories("llama")
    tf.AutoModelForCausalLM.from_pretrained(native).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (native / "model.safetensors").read_bytes()
    assert (tmp_path / "saved" / "config.json").read_bytes() == (native / "config.json").read_bytes()


def test_over_another_save(directories: Directories, tmp_path: Path) -> None:
    _, native = directories("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(native)
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"bitforbit.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert bitforbit.verify(tmp_path).ok


def test_a_save_that_dies_leaves_no_weights_of_the_one_before(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single file wins over an index: left beside new shards, it would be loaded in their place."""
    _, native = directories("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(native)
    model.save_pretrained(tmp_path)
    replace = Path.replace

    def dying(path: Path, target: Path) -> Path:
        if path.name == "bitforbit.json":
            raise OSError("the power went out")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(OSError, match="power"):
        model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert not bitforbit.verify(tmp_path).ok  # the manifest is the earlier one


def test_into_the_directory_it_came_from(directories: Directories, tmp_path: Path) -> None:
    plain, native = directories("llama")
    tf.AutoModelForCausalLM.from_pretrained(native).save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert bitforbit.verify(tmp_path).ok
    expected = tf.AutoModelForCausalLM.from_pretrained(plain)
    for each in (model, tf.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(zoo.logits(each, "llama", 1), zoo.logits(expected, "llama", 1))


@pytest.mark.parametrize("size", ["50GB", "200KB"])
def test_variant(size: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories("llama")
    tf.AutoModelForCausalLM.from_pretrained(native).save_pretrained(tmp_path / "a", variant="v2", max_shard_size=size)
    tf.AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "b", variant="v2", max_shard_size=size)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()} | {
        "bitforbit.json"
    }
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "a", variant="v2")
    expected = tf.AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(zoo.logits(again, "llama", 1), zoo.logits(expected, "llama", 1))


def test_kept_modules_are_stored_plain(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    config = BitforbitConfig(modules_to_not_convert=["lm_head"])
    one = tf.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    other = bitforbit.compress_model(tf.AutoModelForCausalLM.from_pretrained(plain), skip=["lm_head"])
    for i, model in enumerate((one, other)):
        model.save_pretrained(tmp_path / str(i))
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        assert type(again.lm_head) is torch.nn.Linear
        assert isinstance(again.model.layers[0].mlp.up_proj, Compressed)


def test_config_of_the_saved_model(directories: Directories, tmp_path: Path) -> None:
    _, native = directories("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(native, quantization_config=BitforbitConfig(mode="fused"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "bitforbit", "format_version": 1, "codec": "planes"}
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert model.config.quantization_config.mode == "fused"


def test_nothing_is_left_behind_by_a_failure(directories: Directories, tmp_path: Path, monkeypatch: Any) -> None:
    from bitforbit.integrations import native as writer

    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1])
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "hash_stored", fail)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_push_to_hub_sends_these_files(directories: Directories, monkeypatch: Any) -> None:
    """Up to the two calls that need the network."""
    sent: list[set[str]] = []

    def upload(self: Any, working_dir: str, *args: object, **kwargs: object) -> None:
        sent.append({path.name for path in Path(working_dir).iterdir()})

    def create(self: Any, repo_id: str, **kwargs: object) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1])
    monkeypatch.setattr(tf.PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    model.push_to_hub("user/name")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, push_to_hub=True, repo_id="user/name")
    expected = {"model.safetensors", "config.json", "generation_config.json", "bitforbit.json", "README.md"}
    assert sent == [expected, expected]


def test_the_method_of_the_class_is_refused(directories: Directories, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1])
    with pytest.raises(errors.UsageError, match=r"model\.save_pretrained"):
        tf.LlamaForCausalLM.save_pretrained(model, tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))


def test_a_file_in_the_way(directories: Directories, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UsageError, match="got a file"):
        tf.AutoModelForCausalLM.from_pretrained(directories("llama")[1]).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves(copied: Any, directories: Directories, tmp_path: Path) -> None:
    _, native = directories("llama-tied")
    model = tf.AutoModelForCausalLM.from_pretrained(native)
    other = copied(model)
    assert torch.equal(zoo.logits(other, "llama", 1), zoo.logits(model, "llama", 1))
    with torch.no_grad():
        other.model.norm.weight.zero_()
    other.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not again.model.norm.weight.any()
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_compressed_and_decompressed_after_loading(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama-tied")
    expected = tf.AutoModelForCausalLM.from_pretrained(plain)
    model = bitforbit.compress_model(tf.AutoModelForCausalLM.from_pretrained(plain))
    model.tie_weights()
    assert torch.equal(zoo.logits(model, "llama", 1), zoo.logits(expected, "llama", 1))
    bitforbit.decompress_model(model)
    assert not hasattr(model.config, "quantization_config")
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
