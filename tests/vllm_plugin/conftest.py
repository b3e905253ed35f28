"""vLLM on CPUs, in processes of its own: tiny models with random weights, plain and compressed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

Result = dict[str, Any]
Generate = Callable[..., list[Result]]

_RUNNER = Path(__file__).with_name("generate_with_vllm.py")
_SIZES = {
    "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so that logits differ much, and tokens too
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``llama``, ``qwen3`` (tied, with biases) and ``mixtral``, and each of them with ``-packed``."""
    import torch
    import transformers

    import bitforbit

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, attention_bias=True)),
        "qwen3": transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True)
        ),
        "mixtral": transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)
        ),
    }
    for name, model in made.items():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.1)  # biases are zero otherwise
        model.to(torch.bfloat16).save_pretrained(root / name)
        bitforbit.compress(root / name, root / f"{name}-packed")
    return root


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment variables of a process that runs vLLM: small, quiet, and without network."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the function that looks at parameters travels to the workers
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **settings}


@pytest.fixture(scope="session")
def generate(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Generate:
    """Results of engines with these options, made one after the other in one new process."""

    def run(*runs: dict[str, Any], **variables: str) -> list[Result]:
        path = tmp_path_factory.mktemp("results") / "results.json"
        subprocess.run(
            [sys.executable, str(_RUNNER), json.dumps(runs), str(path)],
            env={**environment, **variables},
            check=True,
            timeout=600,
        )
        results: list[Result] = json.loads(path.read_text())
        return results

    return run
