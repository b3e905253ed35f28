"""One way to generate with a model that does not fit, alone in a process: the child of :mod:`benchmarks.offload`.

Reads one JSON object from standard input, prints one. Joins its cgroup before anything large is imported.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """``budget``: bytes that the model's tensors may take, None: no limit; ``group``: the cgroup's path, or None."""

    way: str
    path: str
    budget: int | None
    prompt_tokens: int
    new_tokens: int
    group: str | None
    folder: str
    """For what accelerate writes."""


@dataclass(frozen=True)
class Outcome:
    """``bytes_per_token``: read from disk after the first token; ``blocks``: of the decoder, by where they are kept.

    ``slot_bytes``: memory that streamed blocks pass through; ``late``: of the blocks that were fetched those that
    nobody had asked for before they were to run.
    """

    tokens: list[int]
    digest: str
    load_seconds: float
    first_token_seconds: float
    seconds_per_token: float
    bytes_per_token: float
    loaded_rss: int | None
    peak_rss: int | None
    peak_group: int | None
    blocks: dict[str, int]
    slot_bytes: int
    late: int


def load(task: Task) -> Any:
    """The model, where the way and the budget put it."""
    from transformers import AutoModelForCausalLM

    from bitforbit import BitforbitConfig
    from bitforbit.integrations.transformers import offload
    from bitforbit.offload import AHEAD

    how, _, weights = task.way.partition(" ")
    options: dict[str, Any] = {"dtype": "auto"}
    if weights == "exact":
        options["quantization_config"] = BitforbitConfig(**({} if how == "streamed" else {"ahead": None}))
    if task.budget is not None:
        room = task.budget
        if task.way == "streamed BF16":
            # accelerate leaves room for one block; compressed models see to theirs by themselves.
            room -= AHEAD * largest_block(task.path)
        options |= {"device_map": "auto", "max_memory": {"cpu": room}, "offload_folder": task.folder}
    model = AutoModelForCausalLM.from_pretrained(task.path, **options).eval()
    if task.way == "streamed BF16":
        offload.stream(model, AHEAD)
    if task.budget is not None:
        keep(model)
    return model


def largest_block(path: str) -> int:
    """Bytes of the largest decoder layer of a plain model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    return max(sum(2 * p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers)


def keep(model: Any) -> None:
    """Give what is to stay in memory pages of its own: mapped ones make way for what is read from disk later."""
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if tensor.is_cpu:  # not on the meta device: elsewhere
            tensor.data = tensor.detach().clone()


def generate(model: Any, task: Task) -> dict[str, Any]:
    """Greedily, after a prompt of random ids; what came out, and how long it took."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.marks: list[tuple[float, int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.marks.append((time.perf_counter(), bytes_read()))

        def end(self) -> None:
            pass

    clock = Clock()
    prompt = torch.randint(model.config.vocab_size, (1, task.prompt_tokens), generator=torch.Generator().manual_seed(0))
    config = GenerationConfig(
        max_new_tokens=task.new_tokens, min_new_tokens=task.new_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=clock)
    digest = hashlib.sha256()
    for logits in out.logits:
        digest.update(logits.contiguous().view(torch.uint8).numpy().tobytes())
    begin, first, *_, last = clock.marks  # the prompt itself comes first
    count = task.new_tokens - 1
    return {
        "tokens": out.sequences[0, task.prompt_tokens :].tolist(),
        "digest": digest.hexdigest(),
        "first_token_seconds": first[0] - begin[0],
        "seconds_per_token": (last[0] - first[0]) / count,
        "bytes_per_token": (last[1] - first[1]) / count,
    }


def bytes_read() -> int:
    """From disk by this process so far, whether through read or through mapped files."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    return 0


def blocks(model: Any) -> dict[str, int]:
    """Decoder layers by place."""
    from bitforbit.integrations.transformers.offload import streams_of

    placed: dict[str, Any] = getattr(model, "hf_device_map", {})
    streamed = {name for stream in streams_of(model) for name in stream.names}
    layers = model.get_decoder().layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found: Counter[str] = Counter()
    for i in range(len(layers)):
        name = f"{prefix}.{i}"
        if name in streamed:  # the map then says where it runs
            found["disk"] += 1
            continue
        inside = {str(place) for key, place in placed.items() if key == name or key.startswith(f"{name}.")}
        # A layer may be cut; what holds all of it is named by one of its parents.
        above = (str(place) for key, place in placed.items() if not key or name.startswith(f"{key}."))
        inside = inside or set(above) or {"cpu"}
        found["disk" if "disk" in inside else inside.pop()] += 1
    return dict(found)


def measure(task: Task) -> Outcome:
    """Load and generate once; nothing is warm."""
    from benchmarks.memory_limit import Group
    from bitforbit.integrations.generation import memory
    from bitforbit.integrations.generation.load import quiet_transformers
    from bitforbit.integrations.transformers.offload import streams_of

    quiet_transformers()
    begin = time.perf_counter()
    model = load(task)
    seconds = time.perf_counter() - begin
    gc.collect()
    memory.give_back_freed()
    loaded = memory.resident_bytes()
    was_reset = memory.reset_peak()
    values = generate(model, task)
    return Outcome(
        **values,
        load_seconds=seconds,
        loaded_rss=loaded,
        peak_rss=memory.peak_bytes() if was_reset else None,
        peak_group=None if task.group is None else Group(Path(task.group)).peak_bytes(),
        blocks=blocks(model),
        slot_bytes=sum(stream.slot_bytes for stream in streams_of(model)),
        late=sum(stream.fetched[1] for stream in streams_of(model)),
    )


def main() -> int:
    """Do what standard input asks for."""
    from benchmarks.memory_limit import Group

    task = Task(**json.load(sys.stdin))
    Group(None if task.group is None else Path(task.group)).join()
    print(json.dumps(asdict(measure(task))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
