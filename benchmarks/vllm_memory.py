"""Memory while vLLM loads a model: ``python -m benchmarks.vllm_memory [LAYERS]``, with the CPU build of vLLM.

A Llama with random weights (hidden size 2048, 16 layers unless told otherwise) is loaded as it is, compressed, and
compressed while it loads, each in a process of its own. What is printed is memory of the process beyond what it had
before loading, in MiB: peaks of all memory (the kernel's count) and of memory that is no file's (sampled every 2 ms;
pages of a mapped file count in the former), and what is left in the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import bitforbit

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 2048, 8192, 32000, 16, 8
MIB = 1 << 20


def write_model(path: Path, layers: int) -> None:
    """A checkpoint with normal weights in BF16, written tensor by tensor into one file."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return torch.empty(rows, cols, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    kv = HIDDEN // HEADS * KV_HEADS
    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "lm_head.weight": matrix(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for part, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            tensors[f"{name}.self_attn.{part}_proj.weight"] = matrix(rows, HIDDEN)
        tensors[f"{name}.mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{name}.mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def status(field: str) -> int:
    """A size of this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(options: dict[str, Any]) -> dict[str, int]:
    """Load a model in this process; bytes beyond those before."""
    from vllm import LLM
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    found: dict[str, int] = {}
    stock = DefaultModelLoader.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        before, private = status("VmRSS"), status("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        done, samples = threading.Event(), [private]

        def sample() -> None:
            while not done.wait(0.002):
                samples.append(status("RssAnon"))

        sampler = threading.Thread(target=sample)
        sampler.start()
        model = stock(*args, **kwargs)
        done.set()
        sampler.join()
        found["peak"], found["peak_private"] = status("VmHWM") - before, max(samples) - private
        found["after"] = status("RssAnon") - private
        found["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
        return model

    DefaultModelLoader.load_model = load
    LLM(skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, max_num_seqs=4, enforce_eager=True, **options)
    return found


def run(layers: int = 16) -> None:
    """Print a line for each way to load the model."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as temporary:
        plain, packed = Path(temporary) / "plain", Path(temporary) / "packed"
        write_model(plain, layers)
        bitforbit.compress(plain, packed)
        ways = {
            "plain": {"model": str(plain)},
            "compressed": {"model": str(packed)},
            "compressed while loading": {"model": str(plain), "quantization": "bitforbit"},
        }
        print(f"{'MiB':26}{'weights':>10}{'peak':>10}{'no file':>10}{'after':>10}", flush=True)
        for name, options in ways.items():
            result = Path(temporary) / "result.json"
            command = [sys.executable, "-m", "benchmarks.vllm_memory", json.dumps(options), str(result)]
            done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            found = json.loads(result.read_text())
            columns = (found[key] // MIB for key in ("weights", "peak", "peak_private", "after"))
            print(f"{name:26}" + "".join(f"{column:10}" for column in columns), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        run(*map(int, sys.argv[1:]))
