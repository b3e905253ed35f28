"""Run vLLM engines, one after the other, in a process of its own, whose start costs more than the engines do.

argv[1]: JSON list of objects, the options of an engine and, under "environment", variables to set before it is made.
argv[2]: where to write the results, a JSON list.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(runs: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps([result(**run) for run in runs]))


def result(environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """Greedy tokens, the logarithms of the three best at each step, and what the parameters are."""
    os.environ.update(environment or {})
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from bitforbit.ops import stats

    stats.reset()
    llm = LLM(skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, max_num_seqs=4, seed=0, **options)
    sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, logprobs=3)
    prompts = [{"prompt_token_ids": list(range(1, 40))}, {"prompt_token_ids": [7, 3, 5]}]
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [[{str(i): p.logprob for i, p in step.items()} for step in output.logprobs] for output in outputs]
    parameters = llm.collective_rpc(parameter_sizes)
    for name in environment or {}:
        del os.environ[name]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    fused = stats.snapshot()["fused"].linears  # of this process
    return {"tokens": tokens, "logprobs": logprobs, "parameters": parameters, "fused": fused}


def parameter_sizes(worker: Any) -> dict[str, list[Any]]:
    """Name of each parameter that a process has -> its dtype and number of bytes."""
    model = worker.model_runner.model
    return {name: [str(p.dtype), p.numel() * p.element_size()] for name, p in model.named_parameters()}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
