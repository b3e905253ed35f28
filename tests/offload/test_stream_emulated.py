"""Streamed blocks in the layouts of GPUs, on CPU tensors through the emulation.

Slots are used by one block after the other: what others remember of weights (decoding ahead, linears with the same
input, tables of addresses, conversions) must never be another block's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitforbit import nn as bnn
from bitforbit.nn import layout
from bitforbit.offload import Stream, stream_blocks
from bitforbit.ops import gpu
from bitforbit.ops.gpu import prefetch, runtime, volatile
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from offload import cases
from torch_helpers import assert_same_bits


@pytest.fixture(autouse=True)
def cpu_is_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")
    with gpu.emulate(EmulatedQueue(EmulatedLauncher(3))):
        yield
        gpu.clear()


def planes(plain: nn.Module, mode: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A compressed copy that is in host memory, not yet on the "GPU"."""
    with monkeypatch.context() as patch:
        patch.setattr(layout, "is_gpu", lambda device: False)
        return cases.compressed(plain, mode)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "mode", "tokens"),
    [(torch.bfloat16, "exact", 1), (torch.bfloat16, "fused", 1), (torch.float16, "exact", 70)],
)
def test_blocks_arrive_in_tiles(dtype: torch.dtype, mode: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cases.model(3, dtype)
    made, resident = (planes(plain, mode, monkeypatch) for _ in range(2))
    at_rest = {name: value.clone() for name, value in made.state_dict().items()}
    stream = stream_blocks(made.named(), "cpu", ahead=1)
    bnn.set_layout(resident, "auto")
    assert bnn.compressed_parameters(resident.blocks[0].out)["weight"].layout == "tiles"
    seen = set[str]()
    for block in made.blocks:
        block.out.register_forward_pre_hook(
            lambda module, args: seen.add(bnn.compressed_parameters(module)["weight"].layout)
        )
    for seed in range(2):
        x = cases.inputs(tokens, dtype, seed=seed)
        expected = resident(x) if mode == "fused" else plain(x)
        assert_same_bits(made(x), expected)
    assert seen == {"tiles"}
    for name in stream.names:  # what is saved: the planes of the files
        for own, value in stream.tensors(name).items():
            assert_same_bits(value, at_rest[f"{name}.{own}"])


@torch.no_grad()
def test_other_blocks_from_files_are_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cases.model(5)
    made = planes(plain, "exact", monkeypatch)
    stored = cases.to_files(made, tmp_path)
    stream_blocks(made.named(), "cpu", ahead=1, stored=stored)
    for seed in range(3):
        assert_same_bits(made(cases.inputs(seed=seed)), plain(cases.inputs(seed=seed)))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_resident_blocks_between_streamed_ones(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that stay are decoded ahead as ever, those in slots never."""
    plain = cases.model(5)
    made, resident = (planes(plain, mode, monkeypatch) for _ in range(2))
    streamed = {name: block for name, block in made.named().items() if name[-1] in "04"}
    stream_blocks(streamed, "cpu", ahead=0)
    bnn.set_layout(resident, "auto")
    for number in (1, 2, 3):
        bnn.set_layout(made.blocks[number], "auto")
    in_slots: list[bool] = []
    real = prefetch.Prefetcher._start

    def start(self: Any, wanted: Any) -> None:
        in_slots.extend(volatile.holds(ahead.weight.parts[0]) for ahead in wanted)
        real(self, wanted)

    monkeypatch.setattr(prefetch.Prefetcher, "_start", start)
    for seed in range(2):
        x = cases.inputs(70, seed=seed)
        assert_same_bits(made(x), resident(x) if mode == "fused" else plain(x))
    assert in_slots
    assert not any(in_slots)


@torch.no_grad()
def test_a_weight_used_twice_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor is alive, yet not decoded ahead: nobody would wait for that before the slot is filled again."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
            self.b = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(self.a(x)))

    plain = nn.Sequential(*(Twice() for _ in range(3))).requires_grad_(False)
    made = planes(plain, "exact", monkeypatch)
    stream_blocks({str(number): block for number, block in enumerate(made)}, "cpu", ahead=0)
    for seed in range(4):
        x = cases.inputs(70, seed=seed)
        assert_same_bits(made(x), plain(x))
    for _, prefetcher in runtime._local.prefetchers.values():
        assert not prefetcher._ahead
    assert not any(len(order) for order in runtime._successors.values())


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cases.model(4)
    made = planes(plain, "exact", monkeypatch)
    stream_blocks(made.named(), "cpu", ahead=0)
    grads = []
    for each in (made, plain):
        x = cases.inputs(5).requires_grad_()
        each(x).float().sum().backward()
        grads.append(x.grad)
    assert_same_bits(*grads)


@torch.no_grad()
def test_the_layout_of_files_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cases.model(3)
    made = planes(plain, "exact", monkeypatch)
    bnn.set_layout(made, "planes")
    stream: Stream = stream_blocks(made.named(), "cpu", ahead=0)
    nbytes = sum(value.numel() * value.element_size() for value in stream.tensors("blocks.0").values())
    assert nbytes <= stream.slot_bytes < nbytes + 256 * 20
    assert_same_bits(made(cases.inputs()), plain(cases.inputs()))
