"""Models whose blocks are streamed, on a CPU: the bits of the model in memory, whatever order, threads and errors."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitforbit import nn as bnn
from bitforbit.errors import BlockReadError, StreamedModelError, UsageError
from bitforbit.offload import slot_sizes, stores, stream_blocks
from offload import cases
from torch_helpers import assert_same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def slow_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads end at odd times, in small chunks."""
    chance, real = random.Random(0), stores.FileStore.read

    def read(self: Any, *args: Any) -> None:
        time.sleep(chance.random() * 2e-4)
        real(self, *args)

    monkeypatch.setattr(stores.FileStore, "read", read)
    monkeypatch.setattr(stores, "CHUNK_BYTES", 5000)


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("ahead", [0, 2, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_compressed", [False, True])
@torch.no_grad()
def test_bits(dtype: torch.dtype, ahead: int, in_files: bool, is_compressed: bool, tmp_path: Path) -> None:
    plain = cases.model(dtype=dtype)
    expected = plain(cases.inputs(dtype=dtype))
    made = cases.compressed(plain) if is_compressed else plain
    stored = cases.to_files(made, tmp_path, 2) if in_files else {}
    stream = stream_blocks(made.named(), "cpu", ahead=ahead, stored=stored)
    for _ in range(3):
        assert_same_bits(made(cases.inputs(dtype=dtype)), expected)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert (stream.file_bytes > 0, stream.host_bytes > 0) == (in_files, not in_files)
    assert stream.slot_bytes == sum(slot_sizes([(stream.file_bytes or stream.host_bytes) // 5] * 5, ahead))
    assert stream.fetched[1] == (15 if ahead == 0 else 1)


@torch.no_grad()
def test_orders(tmp_path: Path) -> None:
    """Blocks that are skipped, or run twice, or in another order than the one given."""
    plain = cases.model(6)
    made = cases.compressed(plain)
    stream_blocks(made.named(), "cpu", stored=cases.to_files(made, tmp_path))
    chance = random.Random(0)
    for seed in range(30):
        plain.order = made.order = [chance.randrange(6) for _ in range(chance.randrange(8))]
        assert_same_bits(made(cases.inputs(seed=seed)), plain(cases.inputs(seed=seed)))


@torch.inference_mode()
def test_inference_mode(tmp_path: Path) -> None:
    plain = cases.model()
    made = cases.compressed(plain)
    stream_blocks(made.named(), "cpu", stored=cases.to_files(made, tmp_path))
    for seed in range(4):
        assert_same_bits(made(cases.inputs(seed=seed)), plain(cases.inputs(seed=seed)))


@torch.no_grad()
def test_two_models_and_threads(tmp_path: Path) -> None:
    """Threads that share a model take turns, block by block; another model does not matter."""
    plains = [cases.model(seed=seed) for seed in (0, 1)]
    mades = [cases.compressed(plain) for plain in plains]
    for number, made in enumerate(mades):
        (tmp_path / str(number)).mkdir()
        stream_blocks(made.named(), "cpu", stored=cases.to_files(made, tmp_path / str(number)))
    expected = {(which, seed): plains[which](cases.inputs(seed=seed)) for which in (0, 1) for seed in range(8)}
    got: dict[tuple[int, int], torch.Tensor] = {}

    def work(which: int, seed: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                got[which, seed] = mades[which](cases.inputs(seed=seed))

    threads = [threading.Thread(target=work, args=key) for key in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, value in expected.items():
        assert_same_bits(got[key], value)


# --- errors ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_file_that_was_cut_fails_the_block_that_needs_it(tmp_path: Path) -> None:
    plain = cases.model(4)
    made = cases.compressed(plain)
    stream_blocks(made.named(), "cpu", stored=cases.to_files(made, tmp_path, 4))
    path = tmp_path / "part-3.safetensors"
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(whole) - 1)
    for times in range(1, 3):
        with pytest.raises(BlockReadError, match=r"part-3\.safetensors, block 'blocks\.3'"):
            made(cases.inputs())
        assert [block.calls for block in made.blocks] == [times, times, times, 0]
    path.write_bytes(whole)
    assert_same_bits(made(cases.inputs()), plain(cases.inputs()))


@torch.no_grad()
def test_a_forward_that_fails(tmp_path: Path) -> None:
    plain = cases.model()
    made = cases.compressed(plain)
    stream_blocks(made.named(), "cpu", stored=cases.to_files(made, tmp_path))
    for _ in range(5):
        with pytest.raises(RuntimeError):
            made(cases.inputs(width=7))
        made.blocks[2].norm.register_forward_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            made(cases.inputs())
        made.blocks[2].norm._forward_hooks.clear()
        assert_same_bits(made(cases.inputs()), plain(cases.inputs()))


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    made = cases.compressed(cases.model())
    with pytest.raises(UsageError, match="at least one block"):
        stream_blocks({}, "cpu")
    with pytest.raises(UsageError, match="at least one block"):
        stream_blocks(made.named(), "cpu", ahead=-1)
    with pytest.raises(UsageError, match=r"'all' and 'blocks\.0'"):
        stream_blocks({"all": made, **made.named()}, "cpu")
    shared = cases.model()
    shared.blocks[1].q_proj.weight = shared.blocks[0].q_proj.weight
    with pytest.raises(UsageError, match=r"'blocks\.0' and 'blocks\.1'"):
        stream_blocks(shared.named(), "cpu")
    cases.to_files(made, tmp_path)
    with pytest.raises(UsageError, match=r"blocks\.0\.norm\.weight to be in memory"):
        stream_blocks(made.named(), "cpu")


def test_no_copies(tmp_path: Path) -> None:
    made = cases.compressed(cases.model())
    stream_blocks(made.named(), "cpu")
    for thing in (made, made.blocks[1]):
        with pytest.raises(StreamedModelError, match="cannot be copied"):
            copy.deepcopy(thing)
        with pytest.raises(StreamedModelError, match="cannot be pickled"):
            pickle.dumps(thing)


# --- lives ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_is_deleted(tmp_path: Path) -> None:
    before = {*threading.enumerate()}

    def readers() -> list[threading.Thread]:
        new = {*threading.enumerate()} - before
        return [thread for thread in new if thread.name.startswith("bitforbit-reader")]

    made = cases.compressed(cases.model())
    stream = weakref.ref(stream_blocks(made.named(), "cpu", stored=cases.to_files(made, tmp_path)))
    made(cases.inputs())
    assert readers()
    del made
    gc.collect()
    assert stream() is None
    for _ in range(200):
        if not readers():
            break
        time.sleep(0.01)
    assert not readers()


@torch.no_grad()
@pytest.mark.parametrize("in_files", [False, True])
def test_blocks_come_back(in_files: bool, tmp_path: Path) -> None:
    plain = cases.model()
    made = cases.compressed(plain)
    expected = {name: value.clone() for name, value in made.state_dict().items()}
    stream = stream_blocks(made.named(), "cpu", stored=cases.to_files(made, tmp_path) if in_files else {})
    made(cases.inputs())
    for name in stream.names:
        for own, value in stream.tensors(name).items():
            assert_same_bits(value, expected[f"{name}.{own}"])
        stream.remove(name, load=True)
        stream.remove(name)
    assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())
    assert_same_bits(made(cases.inputs()), plain(cases.inputs()))
    assert "forward" not in made.blocks[0].__dict__
    copy.deepcopy(made)


@torch.no_grad()
def test_outputs_outlive_their_block() -> None:
    """A block that gives its parameters away gives copies."""

    class Table(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), value), requires_grad=False)

        def forward(self) -> dict[str, Any]:
            return {"all": self.weight, "some": [self.weight[1:3]], "rest": "text"}

    tables = {str(number): Table(number) for number in range(4)}
    stream_blocks(tables, "cpu", ahead=0)
    outputs = [table() for table in tables.values()]
    for number, output in enumerate(outputs):
        assert output["all"].tolist() == [number] * 4
        assert output["some"][0].tolist() == [number] * 2
        assert output["rest"] == "text"


def test_buffers_may_change() -> None:
    """They stay on the device: what a forward writes to them lasts."""
    block = nn.BatchNorm1d(4).requires_grad_(False)
    other = copy.deepcopy(block)
    stream_blocks({"0": block}, "cpu", ahead=0)
    for seed in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        assert_same_bits(block(x), other(x))
    assert torch.equal(block.running_mean, other.running_mean)


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(made: Any, adapters: list[nn.Linear], is_checkpointed: bool) -> list[torch.Tensor]:
    x = cases.inputs().requires_grad_()
    for adapter in adapters:
        adapter.weight.grad = None
    y = x
    for number, block in enumerate(made.blocks):

        def step(y: torch.Tensor, number: int = number, block: nn.Module = block) -> torch.Tensor:
            return block(y) + adapters[number](y)

        y = checkpoint(step, y, use_reentrant=False) if is_checkpointed else step(y)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(adapter.weight.grad for adapter in adapters)]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients(is_checkpointed: bool, tmp_path: Path) -> None:
    """Of inputs and adapters, through blocks whose slots were filled with others meanwhile."""
    plain = cases.model(6)
    made = cases.compressed(plain)
    stream_blocks(made.named(), "cpu", ahead=1, stored=cases.to_files(made, tmp_path))
    adapters = [nn.Linear(cases.WIDTH, cases.WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(6)]
    for _ in range(2):
        expected = gradients(plain, adapters, False)
        for got, want in zip(gradients(made, adapters, is_checkpointed), expected, strict=True):
            assert_same_bits(got, want)


def test_adapters_within_a_block_stay(tmp_path: Path) -> None:
    plain = cases.model(4)
    made = cases.compressed(plain)
    for each in (plain, made):
        for number, block in enumerate(each.blocks):
            torch.manual_seed(number)
            block.out = nn.Sequential(block.out, nn.Linear(cases.WIDTH, cases.WIDTH, dtype=torch.bfloat16))
    stream_blocks(made.named(), "cpu", ahead=0)
    for each in (plain, made):
        each(cases.inputs()).float().sum().backward()
    for ours, theirs in zip(made.blocks, plain.blocks, strict=True):
        assert_same_bits(ours.out[1].weight.grad, theirs.out[1].weight.grad)


def test_streamed_parameters_are_not_trained() -> None:
    made = cases.model()
    stream_blocks(made.named(), "cpu")
    made.requires_grad_(True)
    with pytest.raises(StreamedModelError, match=r"block 'blocks\.0' to be frozen, got weight of blocks\.0\.norm"):
        made(cases.inputs())
    with torch.no_grad():
        made(cases.inputs())


def test_layouts_are_kept_at_rest() -> None:
    made = cases.compressed(cases.model())
    names = list(dict(made.named_parameters()))
    stream_blocks(made.named(), "cpu")
    made(cases.inputs())
    assert list(dict(made.named_parameters())) == names
    assert bnn.compressed_parameters(made.blocks[0].q_proj)["weight"].layout == "planes"


@torch.no_grad()
def test_compiled_models(tmp_path: Path) -> None:
    """Streamed blocks are left out of the graphs."""
    plain = cases.model(3)
    made = cases.compressed(plain)
    stream_blocks(made.named(), "cpu", ahead=0, stored=cases.to_files(made, tmp_path))
    compiled = torch.compile(made, backend="eager")
    for seed in range(3):
        assert_same_bits(compiled(cases.inputs(seed=seed)), plain(cases.inputs(seed=seed)))
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("in_files", [False, True])
def test_blocks_without_parameters(in_files: bool, tmp_path: Path) -> None:
    plain = cases.model(3)
    made = cases.compressed(plain)
    plain.blocks[1] = made.blocks[1] = nn.ReLU()
    stream_blocks(made.named(), "cpu", ahead=1, stored=cases.to_files(made, tmp_path) if in_files else {})
    for seed in range(3):
        assert_same_bits(made(cases.inputs(seed=seed)), plain(cases.inputs(seed=seed)))


def test_a_part_of_a_block_that_checkpoints_itself() -> None:
    """As a layer of transformers may: what is computed again in the backward pass fetches the block again."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own = self.__dict__.get("_gradient_checkpointing_func")
            return self.inner(x) if own is None else own(self.inner.__call__, x)

    plain = cases.model(4)
    made = cases.compressed(plain)
    made.blocks = nn.ModuleList(Outer(block) for block in made.blocks)
    stream_blocks(made.named(), "cpu", ahead=0)
    for block in made.blocks:
        block._gradient_checkpointing_func = lambda forward, *args: checkpoint(forward, *args, use_reentrant=False)
    grads = []
    for each in (made, plain):
        x = cases.inputs().requires_grad_()
        each(x).float().square().sum().backward()
        grads.append(x.grad)
    assert_same_bits(*grads)
