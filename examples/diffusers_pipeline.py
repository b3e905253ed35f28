"""A compressed pipeline of diffusers draws, bit for bit, what its original draws.

    python examples/diffusers_pipeline.py [DIRECTORY [PROMPT]]

DIRECTORY holds a pipeline (model_index.json); without one, a small pipeline with random weights is made. It is
compressed into a temporary directory, checked, and run from there. Needs torch, diffusers and transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

import bitforbit

DTYPE = torch.float16


def small_pipeline(path: Path) -> None:
    """Write an unconditional pipeline."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDIMPipeline(unet.to(DTYPE), DDIMScheduler()).save_pretrained(path)


def draw(path: Path, prompts: list[str]) -> np.ndarray:
    """Images [1, height, width, 3]."""
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=DTYPE)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images: np.ndarray = pipeline(*prompts, num_inference_steps=4, generator=generator, output_type="np").images
    return images


def main(arguments: list[str]) -> int:
    """Compress and draw twice; the status is 1 if the images differ."""
    with tempfile.TemporaryDirectory() as temporary:
        plain, packed = Path(temporary) / "plain", Path(temporary) / "packed"
        if arguments:
            plain = Path(arguments[0])
        else:
            small_pipeline(plain)
        report = bitforbit.compress(plain, packed)
        assert bitforbit.verify(packed, against=plain).ok
        same = np.array_equal(draw(packed, arguments[1:]), draw(plain, arguments[1:]))
    print(f"{report.compressed_bytes:,} of {report.original_bytes:,} bytes, {'the same' if same else 'ANOTHER'} image")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
