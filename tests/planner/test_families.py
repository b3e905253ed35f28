"""Parameters counted from a config against the models that transformers makes of it; from tensors against both."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_configs import CONFIGS

from bitforbit.errors import PlanError
from bitforbit.planner import from_config
from bitforbit.planner.checkpoint import Tensor, from_tensors
from bitforbit.planner.families import FAMILIES
from bitforbit.planner.shapes import Shape

_SMALL = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "torch_dtype": "bfloat16", "pad_token_id": 0,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
_CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("ministral", {"sliding_window": 64}),
    ("qwen2", {"num_key_value_heads": 6}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("gemma", {}),
    ("gemma2", {"sliding_window": 32}),
    ("gemma3_text", {"sliding_window": 32}),
    ("phi3", {"sliding_window": 48, "num_key_value_heads": 6}),
    ("phi", {}),
    ("phi", {"qk_layernorm": True}),
    ("gpt_neox", {"head_dim": None, "num_key_value_heads": None}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen3_moe", {**_MOE, "mlp_only_layers": [0], "decoder_sparse_step": 2}),
    ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 80}),
]


def _config(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    config = {"model_type": family, **_SMALL, **changes}
    if family in ("phi3", "phi", "qwen2", "qwen2_moe"):  # these have no head_dim of their own
        config["head_dim"] = None
    return {name: value for name, value in config.items() if value is not None or name == "sliding_window"}


def _model(config: dict[str, Any]) -> Any:
    return _made(json.dumps(config))


@cache
def _made(text: str) -> Any:
    config = json.loads(text)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in config.items() if name not in ("model_type", "torch_dtype")}
    made = transformers.AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(made)


def _windows(model: Any) -> list[int | None]:
    from transformers import DynamicCache

    sizes = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    return [size if isinstance(size, int) else None for size in sizes]


@pytest.mark.parametrize(("family", "changes"), _CASES)
def test_as_transformers_makes_it(family: str, changes: dict[str, Any]) -> None:
    config = _config(family, changes)
    shape, model = from_config(config), _model(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert [layer.window for layer in shape.layers] == _windows(model)
    assert shape.dimensions.head_dim == (getattr(model.config, "head_dim", None) or 16)


@pytest.mark.parametrize(("family", "changes"), _CASES)
def test_config_and_tensors_agree(family: str, changes: dict[str, Any]) -> None:
    config = _config(family, changes)
    model = _model(config)
    parameters = model.named_parameters()
    tensors = [Tensor(name, tuple(p.shape), "BF16") for name, p in parameters]
    known, read = from_config(config), from_tensors(model.config.to_dict(), tensors)

    def facts(shape: Shape) -> list[Any]:
        return [
            shape.parameters,
            shape.head is None,
            [(sum(m.elements for m in layer.matrices), layer.vectors, layer.window) for layer in shape.layers],
            [sorted((m.count, m.used, m.elements) for m in layer.matrices if m.count > 1) for layer in shape.layers],
        ]

    assert facts(known) == facts(read)


def test_experts_of_a_checkpoint_are_stacked() -> None:
    """Checkpoints have a tensor per expert, transformers merges them."""
    config = _config("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1})
    tensors = [Tensor("model.embed_tokens.weight", (320, 96), "BF16"), Tensor("lm_head.weight", (320, 96), "BF16")]
    base = "model.layers.0."
    tensors += [
        Tensor(f"{base}self_attn.{n}_proj.weight", (r, c), "BF16") for n, r, c in (("q", 96, 96), ("k", 32, 96))
    ]
    tensors += [
        Tensor(f"{base}self_attn.{n}_proj.weight", (r, c), "BF16") for n, r, c in (("v", 32, 96), ("o", 96, 96))
    ]
    tensors += [Tensor(f"{base}block_sparse_moe.gate.weight", (4, 96), "BF16")]
    for expert in range(4):
        for name, rows, cols in (("w1", 160, 96), ("w2", 96, 160), ("w3", 160, 96)):
            tensors.append(Tensor(f"{base}block_sparse_moe.experts.{expert}.{name}.weight", (rows, cols), "BF16", 7))
    layer = from_tensors(config, tensors).layers[0]
    stacks = {m.name: m for m in layer.matrices if m.count > 1}
    assert {name: (m.count, m.rows, m.cols, m.used, m.stored) for name, m in stacks.items()} == {
        "mlp.up": (4, 320, 96, 0.5, 56),
        "mlp.down": (4, 96, 160, 0.5, 28),
    }
    known = {m.name.removeprefix("mlp.").removeprefix("gate_"): m for m in from_config(config).layers[0].matrices}
    assert [stacks[f"mlp.{n}"].elements for n in ("up", "down")] == [known[n].elements for n in ("up", "down")]


@pytest.mark.parametrize(
    ("name", "billions"),
    # Sizes in BF16 by DFloat11's Table 1 (arXiv 2504.11651), halved.
    [("llama-3.1-8b", 8.03), ("llama-3.3-70b", 70.555), ("llama-3.1-405b", 405.855), ("qwen3-14b", 14.77),
     ("qwq-32b", 32.765), ("mistral-nemo", 12.25), ("mistral-small-3", 23.57), ("phi-4", 14.66)],
)  # fmt: skip
def test_published_sizes(name: str, billions: float) -> None:
    assert from_config(CONFIGS[name]).parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_multimodal_configs() -> None:
    """The text model counts; its dtype may stand outside."""
    inner = _config("gemma3_text", {"sliding_window": 32})
    del inner["torch_dtype"]
    shape = from_config({"model_type": "gemma3", "dtype": "float16", "text_config": inner, "vision_config": {}})
    assert shape.dimensions.dtype == "F16"
    assert shape.notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type: expected one of llama"),
        ({"model_type": None}, "got None"),
        ({"hidden_size": None}, "without hidden_size"),
        ({"hidden_size": "96"}, "hidden_size: expected a positive number"),
        ({"num_key_value_heads": 4}, "to divide the heads, got 4 of 6"),
        ({"head_dim": None, "hidden_size": 97}, "multiple of the heads"),
        ({"torch_dtype": "int4"}, "dtype: expected one of bfloat16"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "within 2 experts"),
        ({"model_type": "mixtral"}, "num_local_experts"),
        ({"text_config": []}, "text_config: expected an object"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    config = {"model_type": "llama", **_SMALL, **changes}
    with pytest.raises(PlanError, match=message):
        from_config({name: value for name, value in config.items() if value is not None})


_JUNK = [None, 0, -1, 1, 7, 2**70, 1.5, "8", "", True, [], ["full_attention"], {}, [{}], float("inf")]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(_CASES), st.data())
def test_junk_is_refused_or_counted(case: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    """Whatever a config.json holds: a shape, or a PlanError."""
    config = _config(*case)
    fields = [*config, "layer_types", "sliding_window", "mlp_only_layers", "head_dim", "text_config", "kv_lora_rank"]
    for name in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2)):
        config[name] = data.draw(st.sampled_from(_JUNK))
    with suppress(PlanError):
        assert from_config(config).parameters > 0


def test_all_families_are_tested() -> None:
    assert {family for family, _ in _CASES} | {"gemma3"} == set(FAMILIES)
