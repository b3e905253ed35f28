"""A long prompt, read with attention to a part of it: time, and what it does to the predictions.

    python examples/long_prefill.py [--tokens 1024] [--model DIR]

The model (the one in the package, unless another is given) reads a prompt of program text once with dense attention
and then block-sparse, with several patterns. The loss on the second half of the prompt says what leaving blocks out
costs. The packaged model knows texts of up to 1024 tokens only: it shows the mechanism, not what a model of long texts
would lose or gain. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitforbit
from bitforbit import demo
from bitforbit.integrations.transformers.block_sparse import block_sparse

RUNS = (("dense", 1.0), ("topk", 0.5), ("topk", 0.25), ("local_global", 0.25), ("butterfly", 0.25), ("random", 0.25))


def prompt(path: Path, tokens: int) -> torch.Tensor:
    """The package's own source as ids ``[1, tokens]``, from its start again where it is too short."""
    files = sorted(Path(bitforbit.__file__).parent.glob("**/*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files[:40])
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]


def read(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Mean loss in nats on the second half, and the seconds that the prompt took."""
    half = ids.shape[1] // 2
    begin = time.perf_counter()
    with torch.inference_mode():
        logits = model(ids, logits_to_keep=half + 1, use_cache=False).logits[0, :-1]
    seconds = time.perf_counter() - begin
    return float(functional.cross_entropy(logits.float(), ids[0, -half:])), seconds


def main(arguments: list[str] | None = None) -> int:
    """Print a line per pattern; the status is 1 if the pattern that leaves nothing out changes the loss."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--model", type=Path, default=demo.model_path())
    chosen = options.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype="auto")
    ids = prompt(chosen.model, chosen.tokens)
    reference, seconds = read(model, ids)
    print(f"{'sdpa':<14} all blocks    loss {reference:.4f}   {seconds:.2f} s")
    same = False
    for pattern, density in RUNS:
        block_sparse(model, pattern, density, block=64, dense_below=0)
        loss, seconds = read(model, ids)
        print(f"{pattern:<14} density {density:<5} loss {loss:.4f}   {seconds:.2f} s")
        same = same or (pattern == "dense" and loss == reference)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
