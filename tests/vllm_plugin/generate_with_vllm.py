"""Run vLLM engines, one after the other, in a process of its own, whose start costs more than the engines do.

argv[1]: JSON list of objects, the options of an engine and those of ``result``. argv[2]: where to write the results, a
JSON list.
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


def result(
    environment: dict[str, str] | None = None, lora: str | None = None, reload: str | None = None, **options: Any
) -> dict[str, Any]:
    """Greedy tokens, the logarithms of the three best at each step, and what the parameters are.

    environment: variables to set before the engine is made. lora: an adapter; the tokens without it are ``base``.
    reload: a checkpoint whose weights are loaded into the running engine; ``reloaded`` is what it says then.
    An engine that cannot be made gives ``error``.
    """
    os.environ.update(environment or {})
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    from bitforbit.errors import BitforbitError
    from bitforbit.ops import stats

    stats.reset()
    found: dict[str, Any] = {}
    try:
        llm = LLM(skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, max_num_seqs=4, seed=0, **options)
    except (ValueError, RuntimeError, BitforbitError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    else:
        found |= said(llm, None if lora is None else LoRARequest("adapter", 1, lora))
        if lora is not None:
            found["base"] = said(llm, None)
        found["parameters"] = llm.collective_rpc(parameter_sizes)
        if reload is not None:
            found["refused"] = llm.collective_rpc(error_of_a_write)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": reload})
            found["reloaded"] = said(llm, None)
            found["parameters after"] = llm.collective_rpc(parameter_sizes)
        del llm
    for name in environment or {}:
        del os.environ[name]
    gc.collect()
    cleanup_dist_env_and_memory()
    return {**found, "fused": stats.snapshot()["fused"].linears}  # of this process


def said(llm: Any, lora: Any) -> dict[str, Any]:
    """What an engine answers to two prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, logprobs=3)
    prompts = [{"prompt_token_ids": list(range(1, 40))}, {"prompt_token_ids": [7, 3, 5]}]
    llm.reset_prefix_cache()
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [[{str(i): p.logprob for i, p in step.items()} for step in output.logprobs] for output in outputs]
    return {"tokens": tokens, "logprobs": logprobs}


def parameter_sizes(worker: Any) -> dict[str, list[Any]]:
    """Name of each parameter that a process has -> its dtype and number of bytes."""
    model = worker.model_runner.model
    return {name: [str(p.dtype), p.numel() * p.element_size()] for name, p in model.named_parameters()}


def error_of_a_write(worker: Any) -> str:
    """What a loader is told that writes to the weight of a layer that is in use."""
    import torch

    weight = worker.model_runner.model.model.layers[0].self_attn.qkv_proj.weight
    try:
        weight.data.copy_(torch.zeros(weight.shape))
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
