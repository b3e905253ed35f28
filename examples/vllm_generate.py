"""vLLM writes the same tokens, with the same probabilities, from compressed and from plain weights.

    python examples/vllm_generate.py

The model in the package is run by vLLM as it is, compressed, and restored to a plain directory. Needs vllm.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import bitforbit
from bitforbit import demo

PROMPT = "class Node:\n    def __init__(self"


def write(path: Path) -> list[tuple[int, float]]:
    """Token numbers and the logarithms of their probabilities, written by an engine that is gone afterwards."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=str(path), dtype="bfloat16", max_model_len=256, max_num_seqs=4, enforce_eager=True)
    (request,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=40, logprobs=0), use_tqdm=False)
    output = request.outputs[0]
    print(PROMPT + output.text)
    del llm
    cleanup_dist_env_and_memory()
    steps = zip(output.token_ids, output.logprobs or [], strict=True)
    return [(token, step[token].logprob) for token, step in steps]


def main() -> int:
    """Generate with the compressed and the restored model; the status is 1 if anything differs."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines in this process, one after the other
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        bitforbit.decompress(demo.model_path(), plain)
        same = write(demo.model_path()) == write(plain)
    print("the same tokens and probabilities" if same else "OTHER TOKENS OR PROBABILITIES")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
