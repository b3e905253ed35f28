"""Tiny models and pipelines of diffusers with random weights, and their inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from bitforbit.nn import Compressed

Random = Callable[..., torch.Tensor]


def flux() -> ModelMixin:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


def unet() -> ModelMixin:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip


def vae(latent_channels: int = 4) -> ModelMixin:
    return AutoencoderKL(
        block_out_channels=(32, 64), in_channels=3, out_channels=3, latent_channels=latent_channels, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.0,
        scaling_factor=1.0,
    )  # fmt: skip


def sd3() -> ModelMixin:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip


def qwen() -> ModelMixin:
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def wan() -> ModelMixin:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=4, text_dim=32,
        freq_dim=64, ffn_dim=48, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip


def _flux(r: Random) -> dict[str, Any]:
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    return {
        "hidden_states": r(1, 16, 16), "encoder_hidden_states": r(1, 8, 32), "pooled_projections": r(1, 32),
        "timestep": torch.tensor([0.5]), **ids,
    }  # fmt: skip


def _unet(r: Random) -> dict[str, Any]:
    return {"sample": r(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": r(1, 4, 32)}


def _vae(r: Random) -> dict[str, Any]:
    return {"sample": r(1, 3, 16, 16)}


def _sd3(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, 8, 32), "pooled_projections": r(1, 64),
        "timestep": torch.tensor([3]),
    }  # fmt: skip


def _qwen(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 16, 16), "encoder_hidden_states": r(1, 7, 32), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long), "img_shapes": [(1, 4, 4)],
    }  # fmt: skip


def _wan(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 16, 2, 8, 8), "encoder_hidden_states": r(1, 8, 32), "timestep": torch.tensor([7]),
    }  # fmt: skip


MODELS: dict[str, tuple[Callable[[], ModelMixin], Callable[[Random], dict[str, Any]]]] = {
    "flux": (flux, _flux),
    "unet": (unet, _unet),
    "vae": (vae, _vae),
    "sd3": (sd3, _sd3),
    "qwen": (qwen, _qwen),
    "wan": (wan, _wan),
}


def make(name: str, dtype: torch.dtype = torch.bfloat16) -> ModelMixin:
    """A model of that name with weights as trained ones have: small, no zeros."""
    torch.manual_seed(0)
    return randomize(MODELS[name][0]()).to(dtype).eval()


def randomize(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (0 if parameter.dim() > 1 else 0.1))
    return model


def outputs(name: str, model: ModelMixin) -> torch.Tensor:
    """What the model makes of fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    inputs = MODELS[name][1](lambda *shape: torch.randn(*shape, generator=generator).to(model.dtype))
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).sample
    return result


# --- pipelines ------------------------------------------------------------------------------------------------------


def _tokenizer(root: Path) -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=16)


def _clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=32, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return randomize(CLIPTextModel(config)).eval()  # type: ignore[no-any-return]


def _t5() -> T5EncoderModel:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return randomize(T5EncoderModel(config)).eval()  # type: ignore[no-any-return]


def stable_diffusion(root: Path) -> DiffusionPipeline:
    """A Stable Diffusion without safety checker. ``root`` gets the tokenizer's files."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=randomize(vae()), text_encoder=_clip(), tokenizer=_tokenizer(root), unet=randomize(unet()),
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def flux_pipeline(root: Path) -> DiffusionPipeline:
    """A FLUX with both text encoders."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(root)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=randomize(vae(4)), text_encoder=_clip(), tokenizer=tokenizer,
        text_encoder_2=_t5(), tokenizer_2=tokenizer, transformer=randomize(flux()),
    )  # fmt: skip


def image(pipeline: DiffusionPipeline) -> Any:
    """What the pipeline draws: an array."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": 8} if isinstance(pipeline, FluxPipeline) else {}
    return pipeline(
        "a cat", num_inference_steps=2, height=16, width=16, output_type="np",
        generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip


# --- what tests ask of models ---------------------------------------------------------------------------------------


def compressed_modules(model: nn.Module) -> int:
    return sum(isinstance(module, Compressed) for module in model.modules())


def assert_same_parameters(model: nn.Module, plain: nn.Module) -> None:
    """Every parameter of ``model``, decoded, has the bits of the other's."""
    for name, expected in plain.named_parameters():
        module, _, own = name.rpartition(".")
        value = getattr(model.get_submodule(module), own)
        assert value.dtype == expected.dtype, name
        assert torch.equal(value.detach().clone().view(torch.uint8), expected.detach().view(torch.uint8)), name
