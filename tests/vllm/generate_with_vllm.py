"""Run one vLLM engine in a process of its own: options as JSON in argv[1], the result as JSON in the last line."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(options: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, max_num_seqs=4, **options)
    sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, logprobs=3)
    prompts = [{"prompt_token_ids": list(range(1, 40))}, {"prompt_token_ids": [7, 3, 5]}]
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [[{str(i): p.logprob for i, p in step.items()} for step in output.logprobs] for output in outputs]
    parameters = llm.collective_rpc(parameter_sizes)
    print(json.dumps({"tokens": tokens, "logprobs": logprobs, "parameters": parameters}), flush=True)


def parameter_sizes(worker: Any) -> dict[str, list[Any]]:
    """Name of each parameter that a process has -> its dtype and number of bytes."""
    model = worker.model_runner.model
    return {name: [str(p.dtype), p.numel() * p.element_size()] for name, p in model.named_parameters()}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
