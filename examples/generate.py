"""A compressed model writes, token for token, what its BF16 original writes.

    python examples/generate.py

The model in the package is restored to a plain directory, loaded from there by transformers as it is, and compressed
by transformers with bitforbit: twice the same code. Needs torch and transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitforbit
from bitforbit import demo

PROMPT = "class Node:\n    def __init__(self"


def write(path: Path, **options: object) -> tuple[torch.Tensor, int]:
    """Token ids ``[1, tokens]`` and the bytes of the model's parameters."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(ids[0]))
    return ids, sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> int:
    """Generate with the stored, the restored and the freshly compressed model; the status is 1 if tokens differ."""
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        bitforbit.decompress(demo.model_path(), plain)
        reference, plain_bytes = write(plain)
        # Compressed while it loads; then the directory that is compressed already.
        runs = [write(plain, quantization_config=bitforbit.BitforbitConfig()), write(demo.model_path())]
    for ids, nbytes in runs:
        same = torch.equal(ids, reference)
        print(f"{nbytes:,} of {plain_bytes:,} bytes, {'the same tokens' if same else 'OTHER TOKENS'}")
    return 0 if all(torch.equal(ids, reference) for ids, _ in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
