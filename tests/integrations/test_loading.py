"""Names, dtypes and layouts of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import bitforbit
from bitforbit import BitforbitConfig
from bitforbit.nn import Compressed, compressed_parameters
from integrations import zoo
from integrations.conftest import Directories


def rewrite(plain: Path, changed: Path, change: Any, **config: Any) -> Path:
    """A copy of a single-file model with other tensors and config members."""
    changed.mkdir()
    state = load_file(plain / "model.safetensors")
    save_file({k: v.contiguous() for k, v in change(state).items()}, changed / "model.safetensors", {"format": "pt"})
    members = json.loads((plain / "config.json").read_text()) | config
    (changed / "config.json").write_text(json.dumps(members))
    return changed


def assert_same(plain: Path, native: Path, auto: Any, name: str) -> Any:
    expected = auto.from_pretrained(plain)
    model = auto.from_pretrained(native)
    assert torch.equal(zoo.logits(model, name, 2), zoo.logits(expected, name, 2))
    state = auto.from_pretrained(native).dequantize().state_dict()
    for key, value in expected.state_dict().items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key
    return model


def both_ways(plain: Path, tmp_path: Path, auto: Any, name: str) -> Any:
    """A native directory and compression while loading give the plain model."""
    bitforbit.compress(plain, tmp_path / "compressed")
    model = assert_same(plain, tmp_path / "compressed", auto, name)
    other = auto.from_pretrained(plain, quantization_config=BitforbitConfig())
    assert torch.equal(zoo.logits(other, name, 2), zoo.logits(model, name, 2))
    return model


def test_old_names_of_a_vision_language_model(directories: Directories, tmp_path: Path) -> None:
    """Checkpoints from before transformers 4.52 call the parts of LLaVA otherwise."""
    plain, _ = directories("llava")

    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("language_model.model.") for key in state):
            return state  # transformers writes the old names itself
        renamed = {}
        for key, value in state.items():
            name = key.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
            renamed[f"language_model.{name}" if name.startswith("lm_head") else name] = value
        return renamed

    changed = rewrite(plain, tmp_path / "old", old)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_file(changed / "model.safetensors")
    both_ways(changed, tmp_path, tf.AutoModelForImageTextToText, "llava")


def test_merged_experts_are_compressed(directories: Directories) -> None:
    plain, native = directories("mixtral")
    stored = load_file(plain / "model.safetensors")
    assert any(".experts.3." in name for name in stored)
    model = tf.AutoModelForCausalLM.from_pretrained(native)
    experts = model.model.layers[0].mlp.experts
    assert set(compressed_parameters(experts)) == {"gate_up_proj", "down_proj"}
    assert_same(plain, native, tf.AutoModelForCausalLM, "mixtral")


def test_merged_experts_of_which_some_are_stored_plain(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("mixtral")

    def noisy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for key, value in state.items():
            if ".experts.1.w1." in key or ".experts.2.w3." in key:  # all exponents alike likely: coding does not pay
                bits = torch.randint(0, 0x7F00, value.shape, generator=generator, dtype=torch.int32).to(torch.int16)
                state[key] = bits.view(torch.bfloat16)
        return state

    changed = rewrite(plain, tmp_path / "noisy", noisy)
    bitforbit.compress(changed, tmp_path / "compressed")
    state = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "compressed").dequantize().state_dict()
    for key, value in tf.AutoModelForCausalLM.from_pretrained(changed).state_dict().items():
        assert torch.equal(state[key].view(torch.int16), value.view(torch.int16)), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_base_model_from_a_head_model_and_back(name: str, directories: Directories, tmp_path: Path) -> None:
    plain, native = directories(name)
    base = tf.AutoModel.from_pretrained(native)
    expected = tf.AutoModel.from_pretrained(plain)
    ids = zoo.inputs(name, 1)
    assert torch.equal(base(**ids).last_hidden_state, expected(**ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)
    body = again.base_model
    assert torch.equal(body(**ids).last_hidden_state, expected(**ids).last_hidden_state)
    assert any(isinstance(module, Compressed) for module in body.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    zoo.write("llama", tmp_path / "plain", dtype)
    model = both_ways(tmp_path / "plain", tmp_path, tf.AutoModelForCausalLM, "llama")
    assert model.dtype == dtype
    assert isinstance(model.lm_head, Compressed)


def test_float32_that_is_widened_bfloat16(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    changed = rewrite(plain, tmp_path / "wide", lambda s: {k: v.float() for k, v in s.items()}, dtype="float32")
    model = both_ways(changed, tmp_path, tf.AutoModelForCausalLM, "llama")
    assert compressed_parameters(model.lm_head)["weight"].kind == "BF16"


def test_stored_in_another_dtype_than_the_config_says(directories: Directories, tmp_path: Path) -> None:
    """transformers casts to the config's dtype, so that is what the compressed model has too."""
    plain, _ = directories("mixtral")
    changed = rewrite(plain, tmp_path / "float", lambda s: {k: v.float() for k, v in s.items()}, dtype="bfloat16")
    both_ways(changed, tmp_path, tf.AutoModelForCausalLM, "mixtral")


def test_one_tensor_of_another_dtype(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")

    def mixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for key in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            state[key] = state[key].float() * 1.001
        return state

    both_ways(rewrite(plain, tmp_path / "mixed", mixed), tmp_path, tf.AutoModelForCausalLM, "llama")


def test_explicit_dtypes(directories: Directories) -> None:
    _, native = directories("llama")
    for dtype in ("auto", "bfloat16", torch.bfloat16):
        assert tf.AutoModelForCausalLM.from_pretrained(native, dtype=dtype).dtype == torch.bfloat16


def test_dtype_is_free_while_compressing(directories: Directories) -> None:
    plain, _ = directories("llama")
    expected = tf.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model = tf.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, quantization_config=BitforbitConfig())
    assert torch.equal(zoo.logits(model, "llama", 1), zoo.logits(expected, "llama", 1))


def test_config_without_a_dtype(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    changed = rewrite(plain, tmp_path / "plain", lambda s: s, dtype=None)
    both_ways(changed, tmp_path, tf.AutoModelForCausalLM, "llama")


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", None])
def test_tied_weights_stored_once_or_twice(kept: str | None, directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama-tied")

    def store(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (value,) = (state.pop(k) for k in list(state) if "embed_tokens" in k or k.startswith("lm_head"))
        names = [kept] if kept else ["model.embed_tokens.weight", "lm_head.weight"]
        return state | {name: value.clone() for name in names}

    model = both_ways(rewrite(plain, tmp_path / "tied", store), tmp_path, tf.AutoModelForCausalLM, "llama-tied")
    for part in ("code", "digits", "sign_mantissa", "tails"):
        assert getattr(model.lm_head, f"{part}__weight") is getattr(model.model.embed_tokens, f"{part}__weight")
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_tied_by_config_but_stored_with_two_values(directories: Directories, tmp_path: Path) -> None:
    """transformers does not tie these then."""
    plain, _ = directories("llama-tied")

    def store(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"lm_head.weight": state["model.embed_tokens.weight"] * 1.5}

    both_ways(rewrite(plain, tmp_path / "two", store), tmp_path, tf.AutoModelForCausalLM, "llama-tied")


def test_kept_modules(directories: Directories) -> None:
    plain, native = directories("llama")
    config = BitforbitConfig(modules_to_not_convert=["lm_*", "layers.0"])
    for directory in (plain, native):
        model = tf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
        assert type(model.lm_head) is torch.nn.Linear
        assert not any(isinstance(m, Compressed) for m in model.model.layers[0].modules())
        assert isinstance(model.model.layers[1].mlp.up_proj, Compressed)
        expected = tf.AutoModelForCausalLM.from_pretrained(plain)
        assert torch.equal(zoo.logits(model, "llama", 1), zoo.logits(expected, "llama", 1))


def test_key_mapping(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("llama")
    changed = rewrite(plain, tmp_path / "odd", lambda s: {k.replace("mlp.", "ffn."): v for k, v in s.items()})
    bitforbit.compress(changed, tmp_path / "compressed")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", key_mapping={r"\.ffn\.": ".mlp."})
    expected = tf.AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(zoo.logits(model, "llama", 1), zoo.logits(expected, "llama", 1))


def test_sharded_directories(directories: Directories, tmp_path: Path) -> None:
    plain, _ = directories("mixtral")
    tf.AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    both_ways(tmp_path / "shards", tmp_path, tf.AutoModelForCausalLM, "mixtral")


def test_the_mode_can_be_changed_without_a_warning_about_anything_else(directories: Directories) -> None:
    _, native = directories("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(native, quantization_config=BitforbitConfig(mode="fused"))
    assert model.config.quantization_config.mode == "fused"
    assert model.lm_head._bitforbit_mode == "fused"


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "llava"])
def test_the_loading_report_is_that_of_the_plain_model(name: str, directories: Directories) -> None:
    plain, native = directories(name)
    auto = zoo.auto_class(name)
    _, expected = auto.from_pretrained(plain, output_loading_info=True)
    assert auto.from_pretrained(native, output_loading_info=True)[1] == expected
    config = BitforbitConfig()
    assert auto.from_pretrained(plain, output_loading_info=True, quantization_config=config)[1] == expected


def test_beam_search(directories: Directories) -> None:
    plain, native = directories("llama")
    a, b = (tf.AutoModelForCausalLM.from_pretrained(d) for d in (plain, native))
    ids = zoo.inputs("llama", 1)["input_ids"]
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    assert torch.equal(a.generate(ids, **kwargs), b.generate(ids, **kwargs))
