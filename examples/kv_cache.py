"""A quantized key-value cache: what it saves, and what it costs.

    python examples/kv_cache.py

The model in the package continues source of Python's standard library, once with its own cache and once with each of
three quantized ones, which are lossy. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitforbit
from bitforbit import demo
from bitforbit.integrations.transformers.kv import figures

PROMPT_TOKENS, NEW_TOKENS = 700, 64
CACHES = {
    "4 bits": {"k_bits": 4, "v_bits": 4},
    "keys 4, values 2": {"k_bits": 4, "v_bits": 2},
    "2 bits": {"k_bits": 2, "v_bits": 2},
}


def main() -> int:
    """Print a line for each cache; the status is 1 if a quantized one takes more than the model's own."""
    model = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer(text)["input_ids"][:PROMPT_TOKENS]])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}

    own = model.generate(ids, **options)
    size = figures(own.past_key_values)
    print(f"{'own cache':18}{size.num_bytes:>10,} bytes, {size.bits_per_element:5.2f} bits per element")
    largest = 0
    for name, settings in CACHES.items():
        cache = bitforbit.kivi_cache(model, **settings)
        out = model.generate(ids, past_key_values=cache, **options)
        packed = figures(cache)
        same = int((out.sequences == own.sequences)[:, PROMPT_TOKENS:].sum())
        print(
            f"{name:18}{packed.num_bytes:>10,} bytes, {packed.bits_per_element:5.2f} bits per element, "
            f"{same} of {NEW_TOKENS} tokens the same"
        )
        largest = max(largest, packed.num_bytes)
    return 0 if largest < size.num_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
