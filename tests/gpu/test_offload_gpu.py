"""Streamed blocks on a real GPU: the bits of the model in its memory, however streams, threads and copies race."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bitforbit import nn as bnn
from bitforbit.errors import BlockReadError, StreamedModelError
from bitforbit.offload import movers, stores, stream_blocks
from bitforbit.ops import gpu
from offload import cases
from torch_helpers import assert_same_bits

DEVICE = "cuda"
WIDTH = 512


@pytest.fixture(autouse=True)
def no_errors_left() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    gpu.check_status(torch.device(DEVICE, torch.cuda.current_device()))
    gpu.clear()


def expected_of(plain: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the plain model gives on the GPU."""
    with torch.no_grad():
        on_gpu = plain.to(DEVICE)
        outputs = [on_gpu(x) for x in inputs]
        torch.cuda.synchronize()
    return outputs


def case(
    count: int = 12, dtype: torch.dtype = torch.bfloat16, mode: str = "exact", times: int = 6, tokens: int = 3
) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """A compressed model in host memory, inputs on the GPU, and the outputs of the same model in its memory."""
    plain = cases.model(count, dtype, width=WIDTH)
    made = cases.compressed(plain, mode)
    inputs = [cases.inputs(tokens, dtype, WIDTH, seed).to(DEVICE) for seed in range(times)]
    resident = cases.compressed(plain, mode) if mode == "fused" else plain
    return made, inputs, expected_of(resident, inputs)


@torch.no_grad()
@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits(dtype: torch.dtype, mode: str, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_files and mode == "fused":
        pytest.skip("planes are decoded in both modes, and tiles have another order of sums")
    monkeypatch.setattr(stores, "CHUNK_BYTES", 1 << 20)
    made, inputs, expected = case(dtype=dtype, mode=mode)
    stored = cases.to_files(made, tmp_path, 3) if in_files else {}
    stream = stream_blocks(made.named(), DEVICE, stored=stored)
    for x, want in zip(inputs, expected, strict=True):
        assert_same_bits(made(x), want)
    assert stream.fetched[1] == 1


@torch.no_grad()
@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
@pytest.mark.parametrize("in_files", [False, True])
def test_races(ahead: int, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that all differ, over many tokens, with streams and readers that are late at random."""
    chance = random.Random(ahead)
    real_fill, real_read = movers.CudaMover.fill, stores.FileStore.read

    def fill(self: Any, *args: Any) -> Any:
        if chance.random() < 0.5:
            with torch.cuda.stream(self._side):
                torch.cuda._sleep(chance.randrange(1_000_000))
        return real_fill(self, *args)

    def read(self: Any, *args: Any) -> None:
        time.sleep(chance.random() * 2e-3)
        real_read(self, *args)

    monkeypatch.setattr(movers.CudaMover, "fill", fill)
    monkeypatch.setattr(stores.FileStore, "read", read)
    monkeypatch.setattr(stores, "CHUNK_BYTES", 300_000)
    made, inputs, expected = case(20, times=10)
    stream_blocks(made.named(), DEVICE, ahead=ahead, stored=cases.to_files(made, tmp_path) if in_files else {})

    def late(*args: Any) -> None:
        if chance.random() < 0.3:
            torch.cuda._sleep(chance.randrange(2_000_000))

    for block in made.blocks:
        block.norm.register_forward_hook(late)
        block.out.register_forward_hook(late)
    outputs = [made(x) for _ in range(5) for x in inputs]  # nothing waits for the device in between
    for number, output in enumerate(outputs):
        assert_same_bits(output, expected[number % len(expected)])


@torch.no_grad()
def test_streams_and_threads() -> None:
    """Each thread on a stream of its own: a slot is refilled when the work of all streams that read it has ended."""
    made, inputs, expected = case(8, times=4)
    stream_blocks(made.named(), DEVICE, ahead=1)
    torch.cuda.synchronize()

    def work(number: int) -> torch.Tensor:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                torch.cuda._sleep(500_000)
                output: torch.Tensor = made(inputs[number])
            torch.cuda.current_stream().synchronize()
        return output

    with ThreadPoolExecutor(4) as pool:
        for output, want in zip(pool.map(work, range(4)), expected, strict=True):
            assert_same_bits(output, want)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_resident_and_streamed_blocks(mode: str) -> None:
    made, inputs, expected = case(9, mode=mode, tokens=40)
    streamed = {name: block for name, block in made.named().items() if int(name.split(".")[1]) % 3}
    for name, block in made.named().items():
        if name not in streamed:
            block.to(DEVICE)
    stream_blocks(streamed, DEVICE)
    for x, want in zip(inputs, expected, strict=True):
        assert_same_bits(made(x), want)
    assert bnn.compressed_parameters(made.blocks[0].out)["weight"].layout == "tiles"


def test_gradients() -> None:
    plain = cases.model(6, width=WIDTH)
    made = cases.compressed(plain)
    stream_blocks(made.named(), DEVICE, ahead=1)
    grads = []
    for each in (made, plain.to(DEVICE)):
        x = cases.inputs(5, width=WIDTH).to(DEVICE).requires_grad_()
        each(x).float().sum().backward()
        grads.append(x.grad)
    assert_same_bits(*grads)


@torch.no_grad()
def test_memory_on_the_device() -> None:
    """The slots, and what a block takes while it runs."""
    made = cases.compressed(cases.model(16, width=2048))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    stream = stream_blocks(made.named(), DEVICE)
    assert torch.cuda.memory_allocated() - before < stream.slot_bytes + (1 << 20)
    torch.cuda.reset_peak_memory_stats()
    x = cases.inputs(width=2048).to(DEVICE)
    for _ in range(2):
        made(x)
    matrix = 2048 * 2048 * 2
    assert torch.cuda.max_memory_allocated() - before < stream.slot_bytes + 3 * matrix + (2 << 20)
    assert stream.host_bytes > 5 * stream.slot_bytes
    del made, stream
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2 << 20


@torch.no_grad()
def test_a_model_is_deleted_while_it_runs() -> None:
    """What gets the memory next is not written to by copies that were under way."""
    for seed in range(5):
        made, inputs, _ = case(6, times=1)
        stream = stream_blocks(made.named(), DEVICE)
        nbytes = stream.slot_bytes
        made(inputs[0])
        with torch.cuda.stream(stream._mover._side):  # type: ignore[attr-defined]
            torch.cuda._sleep(20_000_000)
        made.blocks[0](inputs[0])
        del made, stream
        gc.collect()
        other = [torch.full((nbytes // 3,), seed, dtype=torch.uint8, device=DEVICE) for _ in range(6)]
        torch.cuda.synchronize()
        assert all(bool((each == seed).all()) for each in other)


@torch.no_grad()
def test_host_memory_is_pinned() -> None:
    made = cases.compressed(cases.model(3, width=WIDTH))
    stream = stream_blocks(made.named(), DEVICE)
    for store in stream._stores:
        assert store.in_memory is not None
        assert store.in_memory.is_pinned()


@torch.no_grad()
def test_graphs_are_refused() -> None:
    made, inputs, _ = case(3, times=1)
    stream_blocks(made.named(), DEVICE)
    made(inputs[0])
    torch.cuda.synchronize()
    with pytest.raises(StreamedModelError, match="no CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        made(inputs[0])


@torch.no_grad()
def test_a_file_that_was_cut(tmp_path: Path) -> None:
    made, inputs, expected = case(4, times=1)
    stream_blocks(made.named(), DEVICE, stored=cases.to_files(made, tmp_path, 4))
    path = tmp_path / "part-3.safetensors"
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(whole) - 1)
    for _ in range(2):
        with pytest.raises(BlockReadError, match=r"block 'blocks\.3'"):
            made(inputs[0])
    path.write_bytes(whole)
    assert_same_bits(made(inputs[0]), expected[0])


# --- in transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "gpt2"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_transformers(name: str, place: str, tmp_path: Path) -> None:
    """Layers beside the GPU, in host memory or in files; what is saved are the files that they came from."""
    pytest.importorskip("accelerate")
    import bitforbit
    from bitforbit.integrations import autoload

    autoload.autoload()
    from bitforbit.integrations.transformers.offload import streams_of
    from integrations import zoo

    zoo.write(name, tmp_path / "plain")
    bitforbit.compress(tmp_path / "plain", tmp_path / "native")
    layers = "transformer.h" if name == "gpt2" else "model.layers"
    auto = zoo.auto_class(name)
    expected = auto.from_pretrained(tmp_path / "plain").to(DEVICE)
    if name == "gpt2":
        others = ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"]
    else:
        others = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(others, 0), f"{layers}.0": place, f"{layers}.1": place}
    model = auto.from_pretrained(tmp_path / "native", device_map=places, offload_folder=str(tmp_path / "offload"))
    (stream,) = streams_of(model)
    assert stream.names == [f"{layers}.0", f"{layers}.1"]
    assert (stream.host_bytes > 0) == (place == "cpu")
    x = {key: value.to(DEVICE) for key, value in zoo.inputs(name, 2).items()}
    with torch.no_grad():
        for _ in range(3):
            assert_same_bits(model(**x).logits, expected(**x).logits)
    model.save_pretrained(tmp_path / "saved")
    bitforbit.decompress(tmp_path / "saved", tmp_path / "restored")
    files = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("restored", "plain"))
    assert len({*files}) == 1
