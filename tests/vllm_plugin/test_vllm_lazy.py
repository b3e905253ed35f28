"""Lazy tensors: the values of ordinary ones whatever is done with them, and how much of the whole is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from bitforbit.errors import UsageError  # noqa: E402
from bitforbit.integrations.vllm.lazy import LazyTensor, Range, Whole  # noqa: E402
from torch_helpers import assert_same_bits, random_bits  # noqa: E402


class Memory(Whole):
    """A whole in memory that notes what is read of it."""

    def __init__(self, data: Any) -> None:
        self.data, self.shape, self.dtype = data, tuple(data.shape), data.dtype
        self.reads: list[tuple[Range, Range]] = []

    def read(self, rows: Range, columns: Range) -> Any:
        self.reads.append((rows, columns))
        if self.data.dim() == 0:
            return self.data.clone()
        part = self.data[slice(*rows)]
        return (part if self.data.dim() == 1 else part[..., slice(*columns)]).contiguous()


def of(*shape: int) -> tuple[Any, Any, Memory]:
    data = random_bits(shape, torch.bfloat16)
    whole = Memory(data)
    return LazyTensor.of(whole), data, whole


CUTS: dict[str, tuple[Callable[[Any], Any], Range, Range]] = {
    "narrow rows": (lambda t: t.narrow(0, 3, 5), (3, 8), (0, 12)),
    "narrow columns": (lambda t: t.narrow(1, 4, 6), (0, 16), (4, 10)),
    "both": (lambda t: t[2:9, 3:11], (2, 9), (3, 11)),
    "a row": (lambda t: t[7], (7, 8), (0, 12)),
    "a column": (lambda t: t[:, 5], (0, 16), (5, 6)),
    "an element": (lambda t: t[7, 5], (7, 8), (5, 6)),
    "chunk": (lambda t: t.chunk(4)[3], (12, 16), (0, 12)),
    "unbind after unsqueeze": (lambda t: t[4:8].unsqueeze(0).unbind()[0], (4, 8), (0, 12)),
    "transposed": (lambda t: t[2:5, 4:8].t()[1:3], (2, 5), (5, 7)),
    "every other": (lambda t: t[1:8:2, 2:9:3], (1, 8), (2, 9)),
    "as heads": (lambda t: t.view(4, 4, 12)[2, :, 6:], (8, 12), (6, 12)),
    "columns as heads": (lambda t: t.view(16, 3, 4)[:, 1], (0, 16), (4, 8)),
    "across rows": (lambda t: t.view(-1)[20:30], (1, 3), (0, 12)),
    "all": (lambda t: t.detach(), (0, 16), (0, 12)),
}


@pytest.mark.parametrize("name", CUTS)
def test_cuts_are_read_alone(name: str) -> None:
    cut, rows, columns = CUTS[name]
    lazy, data, whole = of(16, 12)
    part = cut(lazy)
    assert isinstance(part, LazyTensor)
    assert not whole.reads
    assert part.shape == cut(data).shape
    assert part.stride() == cut(data).stride()
    target = torch.empty(part.shape, dtype=part.dtype)
    target.copy_(part)
    assert_same_bits(target, cut(data))
    assert whole.reads == [(rows, columns)]


@pytest.mark.parametrize("seed", range(100))
def test_chains_of_views(seed: int) -> None:
    draw = random.Random(seed)
    lazy, plain, _ = of(*(draw.randint(1, 6) for _ in range(draw.randint(0, 4))))
    for _ in range(draw.randint(0, 5)):
        if plain.dim() == 0:
            break
        dim, other = draw.randrange(plain.dim()), draw.randrange(plain.dim())
        begin = draw.randint(0, plain.shape[dim])
        length = draw.randint(0, plain.shape[dim] - begin)
        steps: list[Callable[[Any], Any]] = [
            lambda t: t.narrow(dim, begin, length),  # noqa: B023
            lambda t: t.transpose(dim, other),  # noqa: B023
            lambda t: t.unsqueeze(dim),  # noqa: B023
            lambda t: t.select(dim, begin) if begin < t.shape[dim] else t,  # noqa: B023
            lambda t: t.reshape(-1),
            lambda t: t.expand(2, *t.shape),
            lambda t: t.as_strided(t.shape, t.stride(), t.storage_offset()),
        ]
        step = draw.choice(steps)
        lazy, plain = step(lazy), step(plain)
    got, expected = (torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in (lazy, plain))
    assert_same_bits(got, expected)


def test_whatever_is_no_view() -> None:
    lazy, data, _ = of(8, 8)
    data.copy_(torch.randn(8, 8))
    assert_same_bits(lazy.float() + 1, data.float() + 1)
    assert_same_bits(torch.cat([lazy, lazy[:2]]), torch.cat([data, data[:2]]))
    assert_same_bits(lazy.view(torch.int16), data.view(torch.int16))
    assert torch.equal(lazy, data)
    assert lazy[1, 2].item() == data[1, 2].item()
    parameter = torch.nn.Parameter(torch.empty(4, 8, dtype=data.dtype), requires_grad=False)
    parameter.data.copy_(lazy[4:])
    assert_same_bits(parameter.data, data[4:])


def test_what_is_written_is_seen_by_other_views() -> None:
    lazy, data, whole = of(8, 8)
    before = lazy[:3]
    lazy[2:4].zero_()
    expected = data.clone()
    expected[2:4] = 0
    assert_same_bits(before.clone(), expected[:3])
    assert_same_bits(lazy.clone(), expected)
    assert len(whole.reads) == 1


def test_refused_writes() -> None:
    lazy, _, whole = of(8, 8)

    def refuse() -> None:
        raise UsageError("read only")

    whole.refuse_write = refuse  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="read only"):
        lazy.copy_(torch.zeros(8, 8))


def test_counting_reads_nothing() -> None:
    from vllm.model_executor.model_loader.reload.meta import CopyCounter

    lazy, _, whole = of(8, 8)
    with CopyCounter() as counter:
        torch.empty(4, 8, dtype=lazy.dtype, device="meta").copy_(lazy[4:])
    assert counter.copied_numel == 32
    assert not whole.reads
