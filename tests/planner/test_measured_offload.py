"""The planned peak of a model of which blocks are streamed, against the measured one on this CPU; slots, exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import bitforbit  # noqa: E402
from bitforbit import BitforbitConfig  # noqa: E402
from bitforbit.integrations.transformers.offload import streams_of  # noqa: E402
from bitforbit.planner import Elsewhere, KvSetting, Offload, Request, find_gpu, read_shape  # noqa: E402
from bitforbit.planner import offload as planned  # noqa: E402
from bitforbit.planner.request import streaming_of  # noqa: E402

OWN = KvSetting("16")
LAYERS, PROMPT, NEW = 8, 200, 6
TOLERANCE = 0.08
"""As for models that fit. Mode fused: exact mode decodes as planned only as long as no order of sums is proven."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("streamed")
    transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(root / "plain")
    bitforbit.compress(root / "plain", root / "native", threads=1)
    return root / "native"


def plan_of(path: Path, capacity: int, method: str = "fused") -> Offload:
    """On a CPU with so much memory."""
    request = Request(read_shape(path), find_gpu("CPU"), call=PROMPT)
    streaming = streaming_of(request, method, OWN, PROMPT + NEW)
    plan = streaming.plan(capacity, Elsewhere(disk=1e9))
    assert plan is not None
    return plan


def load(path: Path, plan: Offload, folder: Path) -> Any:
    """With the blocks that the plan keeps in memory, and its slots."""
    blocks = [*(f"model.layers.{i}" for i in range(LAYERS)), "lm_head"]
    places = {name: "cpu" if i < sum(plan.resident) else "disk" for i, name in enumerate(blocks)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        device_map=places,
        offload_folder=str(folder),
        quantization_config=BitforbitConfig(mode="fused", ahead=plan.slots - 1),
    )
    return model.eval()


def measured(model: Any) -> int:
    """Peak bytes of tensors while it generates: what stays, slots, and what comes and goes."""
    from torch.profiler import ProfilerActivity, profile

    from bitforbit.ops.scratch import SCRATCH

    SCRATCH.clear()
    ids = torch.randint(1, 2048, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    kept = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters() if not p.is_meta}
    slots = sum(stream.slot_bytes for stream in streams_of(model))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    held = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return int(sum(kept.values()) + slots + most + SCRATCH.kept_bytes)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_peak(share: float, directory: Path, tmp_path: Path) -> None:
    request = Request(read_shape(directory), find_gpu("CPU"), call=PROMPT)
    whole = streaming_of(request, "fused", OWN, PROMPT + NEW).whole
    load_of_it = streaming_of(request, "fused", OWN, PROMPT + NEW).load
    plan = plan_of(directory, int(share * whole.memory(load_of_it).total))
    assert 0 < sum(plan.resident) < LAYERS
    model = load(directory, plan, tmp_path)
    (stream,) = streams_of(model)
    assert len(stream.names) == plan.streamed
    assert stream.slot_bytes == pytest.approx(plan.slot_bytes, rel=0.02)  # parts begin on boundaries
    assert stream.file_bytes == pytest.approx(plan.disk_bytes, rel=0.02)
    found = measured(model)
    print(f"{plan.memory.total / 1e6:.2f} planned, {found / 1e6:.2f} measured, {plan}")
    assert plan.memory.total == pytest.approx(found, rel=TOLERANCE)


def test_what_loading_by_itself_keeps(directory: Path, tmp_path: Path) -> None:
    """device_map="auto" with the plan's bytes for weights: as many blocks, but for accelerate's own reserve."""
    request = Request(read_shape(directory), find_gpu("CPU"), call=PROMPT)
    whole = streaming_of(request, "fused", OWN, PROMPT + NEW).whole
    plan = plan_of(directory, int(0.8 * whole.memory(streaming_of(request, "fused", OWN, PROMPT + NEW).load).total))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, device_map="auto", max_memory={"cpu": plan.memory.weights}, offload_folder=str(tmp_path)
    )
    (stream,) = streams_of(model)
    assert abs(len(stream.names) - plan.streamed) <= 2


def test_the_default_of_the_engine() -> None:
    from bitforbit import offload as engine
    from bitforbit.offload import slot_sizes

    assert planned.AHEAD == engine.AHEAD
    sizes = [300, 900, 400, 899, 310, 290, 1, 330]
    blocks = [planned._Block(n, n, 0, 0.0) for n in sizes]
    for ahead in range(9):
        assert planned._largest(blocks, ahead + 1) == sum(slot_sizes(sizes, ahead))
    assert math.isclose(planned.steady_seconds(0, [1, 1], [0, 0], 2), 2)
