"""Small random models of several architectures, and what to feed them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

_TEXT: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _llama(**kwargs: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_TEXT, **kwargs))


def _qwen3() -> Any:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**_TEXT, head_dim=32, tie_word_embeddings=True))


def _gemma3() -> Any:
    config = tf.Gemma3TextConfig(
        **_TEXT, head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    return tf.Gemma3ForCausalLM(config)


def _mistral() -> Any:
    return tf.MistralForCausalLM(tf.MistralConfig(**_TEXT))


def _mixtral() -> Any:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2))


def _gpt2() -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=256, n_positions=128, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )


def _bert() -> Any:
    config = tf.BertConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
        max_position_embeddings=64,
    )  # fmt: skip
    return tf.BertForMaskedLM(config)


def _llava() -> Any:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_index=255,
    )
    return tf.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    text = {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    config = tf.Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        image_token_id=255,
        vision_start_token_id=253,
        vision_end_token_id=254,
    )
    return tf.Qwen2VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "gpt2": _gpt2,
    "bert": _bert,
    "llava": _llava,
    "qwen2-vl": _qwen2_vl,
}

ENCODERS = ("bert",)
CAUSAL = tuple(name for name in MODELS if name not in ENCODERS)


def write(name: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Save a model as transformers would."""
    torch.manual_seed(len(name))
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))  # norms of ones would hide mistakes
    model.save_pretrained(directory)


def auto_class(name: str) -> Any:
    """The auto class for a model."""
    if name == "bert":
        return tf.AutoModelForMaskedLM
    return tf.AutoModelForImageTextToText if name in ("llava", "qwen2-vl") else tf.AutoModelForCausalLM


def inputs(name: str, batch: int) -> dict[str, torch.Tensor]:
    """A prompt; for models that see, with an image."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, 250, (batch, 12), generator=generator)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "llava":
        ids[:, 1:5] = 255
        values["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator).to(torch.bfloat16)
    if name == "qwen2-vl":
        ids[:, 1], ids[:, 2], ids[:, 3] = 253, 255, 254
        values["mm_token_type_ids"] = (ids == 255).to(torch.int64)
        values["pixel_values"] = torch.randn(4 * batch, 3 * 2 * 8 * 8, generator=generator).to(torch.bfloat16)
        values["image_grid_thw"] = torch.tensor([[1, 2, 2]] * batch)
    return values


def logits(model: Any, name: str, batch: int) -> torch.Tensor:
    """Logits of one forward."""
    with torch.no_grad():
        return model(**inputs(name, batch)).logits


def generated(model: Any, name: str, batch: int) -> torch.Tensor:
    """Four tokens, chosen greedily."""
    return model.generate(**inputs(name, batch), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
