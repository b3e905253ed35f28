"""What must not load says so, by a class of its own, and never turns into random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import bitforbit
from bitforbit import BitforbitConfig, errors
from bitforbit.format.header import build_header, read_header
from bitforbit.format.layout import open_shard
from bitforbit.format.spec import LENGTH_BYTES
from integrations.conftest import Directories


@pytest.fixture
def native(directories: Directories, tmp_path: Path) -> Path:
    """A compressed directory to be damaged."""
    return Path(shutil.copytree(directories("llama")[1], tmp_path / "native"))


@pytest.fixture
def sharded(directories: Directories, tmp_path: Path) -> Path:
    """A compressed directory of several shards to be damaged."""
    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[0])
    model.save_pretrained(tmp_path / "plain", max_shard_size="200KB")
    bitforbit.compress(tmp_path / "plain", tmp_path / "sharded")
    return tmp_path / "sharded"


def load(directory: Path, **kwargs: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(directory, **kwargs)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def flip(path: Path, tensor: str) -> None:
    """Change one byte in the middle of a stored tensor."""
    header = read_header(path)
    entry = next(entry for entry in header.tensors if entry.name == tensor)
    with path.open("r+b") as file:
        at = header.data_start + (entry.begin + entry.end) // 2
        file.seek(at)
        byte = file.read(1)[0] ^ 0x10
        file.seek(at)
        file.write(bytes([byte]))


@pytest.mark.parametrize("part", ["code", "digits", "sign_mantissa", "tails"])
def test_damaged_part(part: str, native: Path) -> None:
    flip(native / "model.safetensors", f"model.layers.1.mlp.up_proj.{part}__weight")
    with pytest.raises(
        errors.ChecksumError, match=r"model\.safetensors, tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        load(native)


def test_damage_goes_unseen_only_where_asked_for(native: Path) -> None:
    flip(native / "model.safetensors", "model.layers.1.mlp.up_proj.sign_mantissa__weight")
    model = load(native, quantization_config=BitforbitConfig(verify=False))
    assert model.model.layers[1].mlp.up_proj.weight.shape == (192, 128)


def test_damaged_tensor_that_is_decoded_on_the_way(directories: Directories, tmp_path: Path) -> None:
    native = Path(shutil.copytree(directories("mixtral")[1], tmp_path / "native"))
    stored = next(
        e.name for e in read_header(native / "model.safetensors").tensors if "digits__" in e.name and ".2." in e.name
    )
    flip(native / "model.safetensors", stored)
    with pytest.raises(errors.ChecksumError, match=r"model\.safetensors, tensor"):
        load(native)


def test_truncated_file(native: Path) -> None:
    path = native / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(errors.TruncatedFileError):
        load(native)


def test_changed_record(native: Path) -> None:
    path = native / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'\\"rows\\":192', b'\\"rows\\":193', 1))
    assert path.read_bytes() != data
    with pytest.raises(errors.ChecksumError, match="record"):
        load(native)


def reheader(path: Path, metadata: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Replace the header's metadata."""
    header, data = read_header(path), path.read_bytes()
    head = build_header(header.tensors, metadata(dict(header.metadata)))
    path.write_bytes(head + data[LENGTH_BYTES + len(header.raw_json) :])


@pytest.mark.parametrize(("key", "value"), [("format_version", 2), ("codec_version", 2), ("codec", "waves")])
def test_record_of_a_newer_release(key: str, value: object, native: Path) -> None:
    from bitforbit.format.checksum import xxh3_64

    def newer(metadata: dict[str, str]) -> dict[str, str]:
        record = json.loads(metadata["bitforbit"])
        tensor = record["tensors"]["lm_head.weight"]
        (tensor if key in tensor else record)[key] = value
        text = json.dumps(record)
        return metadata | {"bitforbit": text, "bitforbit_xxh3": xxh3_64([text.encode()])}

    reheader(native / "model.safetensors", newer)
    with pytest.raises(errors.UnsupportedVersionError, match="upgrade bitforbit"):
        load(native)


@pytest.mark.parametrize("change", [{"format_version": 2}, {"codec": "waves"}])
def test_config_of_a_newer_release(change: dict[str, Any], native: Path) -> None:
    edit_config(native, lambda config: config["quantization_config"].update(change))
    with pytest.raises(errors.UnsupportedVersionError, match="upgrade bitforbit"):
        load(native)


def test_unknown_members_of_the_config_are_ignored(native: Path) -> None:
    edit_config(native, lambda config: config["quantization_config"].update(colour="blue"))
    load(native)


def test_shapes_of_another_model(native: Path) -> None:
    edit_config(native, lambda config: config.update(intermediate_size=208))
    with pytest.raises(errors.ShapeMismatchError, match=r"expected shape .* got"):
        load(native)


def test_more_layers_than_there_are_tensors(native: Path) -> None:
    edit_config(native, lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(errors.MissingTensorError, match=r"model\.layers\.2\."):
        load(native)


def test_a_missing_part(native: Path) -> None:
    path = native / "model.safetensors"
    metadata, state = dict(read_header(path).metadata), load_file(path)
    del state["lm_head.digits__weight"]
    save_file(state, path, metadata)
    with pytest.raises(errors.FormatError):
        load(native)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises((errors.FormatError, OSError), match="00002"):
        load(sharded)


def test_a_shard_that_the_index_forgets(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lost = "model-00002-of-00004.safetensors"
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != lost}
    path.write_text(json.dumps(index))
    with pytest.raises(errors.MissingTensorError):
        load(sharded)


def test_shards_that_were_swapped(sharded: Path) -> None:
    a, b = (sharded / f"model-0000{i}-of-00004.safetensors" for i in (1, 2))
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)
    with pytest.raises(errors.MixedFilesError, match="two models are mixed"):
        load(sharded)
    (sharded / "bitforbit.json").unlink()
    with pytest.raises(errors.MissingPartError, match="names"):
        load(sharded)


def test_a_shard_of_another_training_run(sharded: Path, tmp_path: Path) -> None:
    """The same names and shapes, other weights."""
    name = "model-00002-of-00004.safetensors"
    bitforbit.decompress(sharded, tmp_path / "restored")
    data = bytearray((tmp_path / "restored" / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / "restored" / name).write_bytes(data)
    bitforbit.compress(tmp_path / "restored", tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, sharded / name)
    with pytest.raises(errors.MixedFilesError, match=rf"{name}.*bitforbit\.json.*two models are mixed"):
        load(sharded)


def test_plain_weights_under_a_compressed_config(directories: Directories, native: Path) -> None:
    shutil.copy(directories("llama")[0] / "model.safetensors", native)
    with pytest.raises(errors.UsageError, match=r"as config\.json says, got others"):
        load(native)


def test_compressed_weights_under_a_plain_config(directories: Directories, native: Path) -> None:
    """Without our config in config.json only an explicit one calls us; then it works."""
    shutil.copy(directories("llama")[0] / "config.json", native)
    model = load(native, quantization_config=BitforbitConfig())
    assert type(model.lm_head).__module__ == "bitforbit.nn.classes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "float32"])
def test_another_dtype(dtype: Any, native: Path) -> None:
    with pytest.raises(errors.UsageError, match="expected dtype 'auto' or"):
        load(native, dtype=dtype)


def test_other_devices(native: Path) -> None:
    with pytest.raises(errors.UsageError, match="device_map"):
        load(native, device_map={"model": "cpu", "lm_head": "mps"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(native: Path) -> None:
    for device_map in ("cuda", {"": 0}, {"": "cuda:0"}, {"model": "cpu", "lm_head": "cuda"}):
        with pytest.raises(errors.GpuUnavailableError, match="CPU"):
            load(native, device_map=device_map)


def test_runtimes(native: Path, directories: Directories) -> None:
    for runtime, device_map in (("tiles", None), ("tiles", "cpu"), ("df11", "cpu")):
        with pytest.raises(errors.UsageError, match=f"a GPU for runtime='{runtime}', got cpu"):
            load(native, quantization_config=BitforbitConfig(runtime=runtime), device_map=device_map)
    with pytest.raises(errors.UsageError, match="a DFloat11 checkpoint for runtime='df11'"):
        load(native, quantization_config=BitforbitConfig(runtime="df11"))
    with pytest.raises(errors.UsageError, match="runtime to be one of auto, planes, tiles, df11"):
        BitforbitConfig(runtime="gpu")
    assert (
        load(native, quantization_config=BitforbitConfig(runtime="planes")).config.quantization_config.mode == "exact"
    )


def test_a_model_that_was_quantized_before(native: Path) -> None:
    edit_config(native, lambda config: config["quantization_config"].update(base={"quant_method": "fp8"}))
    with pytest.raises(errors.UsageError, match=r"quantized \(fp8\)"):
        load(native)


@pytest.mark.parametrize(
    "options",
    [{"mode": "fast"}, {"threads": 0}, {"threads": True}, {"modules_to_not_convert": "lm_head"}, {"colour": "blue"}],
)
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError, match="expected"):
        BitforbitConfig(**options)


def test_casts_of_the_loaded_model(native: Path) -> None:
    model = load(native)
    for cast in (model.half, model.float, lambda: model.to(torch.float32)):
        with pytest.raises((ValueError, errors.BitforbitError)):
            cast()


def test_a_state_dict_has_no_records(native: Path) -> None:
    config = tf.AutoConfig.from_pretrained(native)
    with pytest.raises(errors.UsageError, match="state_dict"):
        tf.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=load_file(native / "model.safetensors"))


def test_a_state_dict_can_be_compressed(directories: Directories) -> None:
    plain, _ = directories("llama")
    model = tf.LlamaForCausalLM.from_pretrained(
        None,
        config=tf.AutoConfig.from_pretrained(plain),
        state_dict=load_file(plain / "model.safetensors"),
        quantization_config=BitforbitConfig(),
    )
    assert type(model.lm_head).__module__ == "bitforbit.nn.classes"


def test_record_names_every_tensor(native: Path) -> None:
    """What the tests above rely on."""
    assert "lm_head.weight" in open_shard(native / "model.safetensors").record.tensors


def test_units_of_dfloat11_need_a_gpu_to_run(directories: Directories, tmp_path: Path) -> None:
    """They may be loaded without, to be moved later."""
    from bitforbit.nn import compressed_parameters
    from bitforbit.ops import gpu
    from cuda_shim.emulation import EmulatedQueue

    plain, _ = directories("llama")
    bitforbit.compress(plain, tmp_path / "df11", format="df11", threads=1)
    model = load(tmp_path / "df11", quantization_config=BitforbitConfig(runtime="df11"))
    layouts = {spec.layout for module in model.modules() for spec in compressed_parameters(module).values()}
    assert layouts == {"df11"}
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(errors.UsageError, match="on a CUDA device, got cpu"):
        model(ids)
    with gpu.emulate(EmulatedQueue()), torch.no_grad():
        assert torch.equal(model(ids).logits, load(plain)(ids).logits)
