"""Peak memory: an ordinary checkpoint that is compressed while it loads never is in memory as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

import bitforbit

_MIB = 1 << 20

_LOAD = """
import json, sys, threading, time
from bitforbit.integrations.autoload import autoload
autoload()
import torch, transformers, bitforbit
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
directory, compress, warm_up = sys.argv[1], sys.argv[2] == "compress", sys.argv[3]
kwargs = {"quantization_config": bitforbit.BitforbitConfig(threads=1)} if compress else {}
AutoModelForCausalLM.from_pretrained(warm_up, **kwargs)  # everything is imported

def anonymous():
    # Pages of the checkpoint's mapping are the page cache's: they do not count.
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, done, before = [0], [False], anonymous()
def watch():
    while not done[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
done[0] = True
thread.join()
size = sum(t.numel() * t.element_size() for t in {id(p): p for p in model.parameters()}.values())
print(json.dumps({"peak": peak[0] - before, "size": size}))
"""


def llama(hidden: int, layers: int, directory: Path) -> int:
    """Write a random model; returns the bytes of its weights."""
    config = tf.LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load(directory: Path, how: str, warm_up: Path) -> tuple[int, int]:
    """Peak and final size in bytes."""
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(directory), how, str(warm_up)], capture_output=True, check=True
    )
    values = json.loads(result.stdout.splitlines()[-1])
    return values["peak"], values["size"]


@pytest.mark.slow
def test_peak_memory(tmp_path: Path) -> None:
    plain_bytes = llama(1024, 6, tmp_path / "plain")
    llama(64, 1, tmp_path / "small")
    assert plain_bytes > 200 * _MIB
    largest = 4 * 1024 * 1024 * 2
    bitforbit.compress(tmp_path / "plain", tmp_path / "native", threads=1)
    bitforbit.compress(tmp_path / "plain", tmp_path / "df11", format="df11", threads=1)
    for name, how in (("plain", "compress"), ("native", "load"), ("df11", "compress")):
        unit = largest if name != "df11" else 8 * 1024 * 1024 * 2 * 2  # DFloat11 codes a layer as a whole
        peak, size = load(tmp_path / name, how, tmp_path / "small")
        print(f"{name}: peak {peak / _MIB:.0f} MiB, model {size / _MIB:.0f} MiB, plain {plain_bytes / _MIB:.0f} MiB")
        assert size < 0.70 * plain_bytes
        assert peak < size + 4 * unit, (name, peak / _MIB, size / _MIB)
        assert peak < 0.95 * plain_bytes, (name, peak / _MIB, plain_bytes / _MIB)
