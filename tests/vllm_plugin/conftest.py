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
    """A directory with models, each of them with ``-packed`` too, and ``adapter``, a LoRA adapter of ``llama``.

    ``llama`` (with biases), ``qwen3`` and ``gemma`` (tied), ``mixtral``; ``other``, a llama of other weights whose
    config ties a head that is not tied; ``headless``, which lacks one; ``twice``, a qwen3 with a copy of its tied head.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    import bitforbit

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**_SIZES, attention_bias=True)
    made = {
        "llama": transformers.LlamaForCausalLM(llama),
        "qwen3": transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True)
        ),
        "mixtral": transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)
        ),
        "gemma": transformers.GemmaForCausalLM(transformers.GemmaConfig(**_SIZES, head_dim=32)),
        "other": transformers.LlamaForCausalLM(llama),
    }
    for name, model in made.items():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.1)  # biases are zero otherwise
        model.to(torch.bfloat16).save_pretrained(root / name)

    def edited(name: str, source: str, tied: bool, head: str | None) -> None:
        """A model from the files of another, whose config says so and whose head is the tensor of that name."""
        config = json.loads((root / source / "config.json").read_text())
        tensors = load_file(root / source / "model.safetensors")
        found = None if head is None else tensors[head].clone()
        tensors.pop("lm_head.weight", None)
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        whole = tensors if found is None else {**tensors, "lm_head.weight": found}
        save_file(whole, root / name / "model.safetensors", metadata={"format": "pt"})

    edited("headless", "other", tied=False, head=None)
    edited("other", "other", tied=True, head="lm_head.weight")
    edited("twice", "qwen3", tied=True, head="model.embed_tokens.weight")
    for name in (*made, "headless", "twice"):
        bitforbit.compress(root / name, root / f"{name}-packed")
    _write_adapter(root / "adapter", made["llama"])
    return root


def _write_adapter(path: Path, model: Any) -> None:
    """A LoRA adapter of all linear layers and the embeddings, as PEFT writes it."""
    import torch
    from safetensors.torch import save_file

    rank, tensors, layers = 8, {}, set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            outputs, inputs = module.weight.shape
            keys = ("lora_A.weight", "lora_B.weight")
            if isinstance(module, torch.nn.Embedding):
                outputs, inputs, keys = inputs, outputs, ("lora_embedding_A", "lora_embedding_B")
            for key, shape in zip(keys, ((rank, inputs), (outputs, rank)), strict=True):
                tensors[f"base_model.model.{name}.{key}"] = torch.randn(shape, dtype=torch.bfloat16) * 0.2
            layers.add(name.split(".")[-1])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": sorted(layers)}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")


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
