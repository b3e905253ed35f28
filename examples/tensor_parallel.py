"""One model split over several processes (tensor parallelism), each of which holds its part compressed.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [MODEL]

MODEL is a compressed directory; default: the model in the package. On a machine with GPUs every process takes one
(NCCL), else they run on the CPU (gloo). The BF16 original, split the same way, writes the same tokens. Needs torch and
transformers; `python examples/tensor_parallel.py` starts two processes by itself, on the CPU if there is one GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.run import main as torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig

import bitforbit
from bitforbit import BitforbitConfig, demo

PROMPT = "class Node:\n    def __init__(self"


def write(path: Path, **options: object) -> torch.Tensor:
    """Token ids ``[1, tokens]``, the same in every process."""
    split = DistributedConfig(tp_plan="auto")  # the number of processes is torchrun's
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", distributed_config=split, **options)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    ids: torch.Tensor = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    if dist.get_rank() == 0:
        print(tokenizer.decode(ids[0]))
    return ids


def main(model: Path) -> int:
    """Generate with the compressed model and its original; the status is 1 if tokens differ."""
    with tempfile.TemporaryDirectory() as temporary:  # one for each process: they may be on different machines
        plain = Path(temporary) / "plain"
        bitforbit.decompress(model, plain)
        runs = [write(model), write(plain), write(plain, quantization_config=BitforbitConfig())]
    same = all(torch.equal(ids, runs[0]) for ids in runs)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes: {'the same tokens' if same else 'OTHER TOKENS'}")
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    if "RANK" not in os.environ:
        if torch.cuda.device_count() < 2:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two processes cannot share a GPU
        torchrun(["--standalone", "--nproc-per-node", "2", *sys.argv])
    else:
        sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else demo.model_path()))
