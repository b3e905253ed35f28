"""The operators on a real GPU: torch's bits in every layout, on any stream, in graphs, compiled; and their memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.ops.gpu import Policy, scratch_bytes, slices
from helpers.gpu_weights import LAYOUTS, Case
from torch_helpers import KINDS, assert_same_bits, encode, gaussian, random_bits

DEVICE = torch.device("cuda", 0)
POLICIES = {
    "default": Policy(),
    "decode first": Policy(product_first=False),
    "join in the operator": Policy(join_at_use=False),
    "two ahead": Policy(ahead=2),
    "none ahead": Policy(ahead=0),
}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    ops.gpu.check_status(DEVICE)
    ops.gpu.clear()


def weight_of(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return gaussian((rows, cols), seed=seed).to(DEVICE)


def x_of(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


class Chain:
    """Linears one after the other, of changing sizes; large enough that work overlaps."""

    def __init__(self, layout: str, sizes: tuple[int, ...] = (2048, 6144, 2048, 512, 4096, 2048)) -> None:
        self.cases: list[Case] = [
            LAYOUTS[layout](weight_of(rows, cols, seed)) for seed, (cols, rows) in enumerate(pairwise(sizes))
        ]
        self.cols = sizes[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for case in self.cases:
            x = functional.silu(case.linear(x))
        return x

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        for case in self.cases:
            x = functional.silu(functional.linear(x, case.weight))
        return x

    @property
    def sizes(self) -> list[int]:
        return [2 * case.weight.numel() for case in self.cases]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(48, 200), (1024, 4096), (4096, 1024), (1000, 1001)])
@pytest.mark.parametrize("tokens", [1, 8, 33, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_has_the_bits_of_torch(layout, shape, tokens, with_bias):
    case = LAYOUTS[layout](weight_of(*shape))
    bias = x_of(shape[:1], 3) if with_bias else None
    for x in (x_of((tokens, shape[1])), x_of((2, tokens, shape[1])), x_of((tokens, 2, shape[1])).transpose(0, 1)):
        assert_same_bits(case.linear(x, bias).cpu(), functional.linear(x, case.weight, bias).cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_and_embedding(layout):
    case = LAYOUTS[layout](weight_of(1000, 1032))
    for begin, end in ((0, 1000), (3, 17), (999, 1000), (5, 5)):
        assert_same_bits(case.decode(begin, end).cpu(), case.weight[begin:end].cpu())
    for ids in (
        torch.tensor([[0, 999], [7, 7]]),
        torch.tensor([5], dtype=torch.int32),
        torch.arange(40).view(5, 8).t(),
    ):
        assert_same_bits(case.embedding(ids.to(DEVICE)).cpu(), case.weight.cpu()[ids.long()])


@pytest.mark.parametrize("dtype", KINDS)
def test_planes_of_every_kind(dtype):
    weight = random_bits((100, 264), dtype)
    parts, how = encode(weight)
    got = ops.decode(*(part.to(DEVICE) for part in parts), *how, 5, 100)
    assert_same_bits(got.cpu(), weight[5:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_outside_give_zeros_and_a_later_error(layout):
    case = LAYOUTS[layout](weight_of(100, 256))
    got = case.embedding(torch.tensor([3, 100, -1, 4], device=DEVICE))
    torch.cuda.synchronize()
    assert_same_bits(got[[0, 3]].cpu(), case.weight[[3, 4]].cpu())
    assert not got[1:3].any()
    with pytest.raises(IndexError, match="index out of range"):
        ops.gpu.check_status(DEVICE)
    got = case.embedding(torch.tensor([100], device=DEVICE))
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="index out of range"):
        case.embedding(torch.tensor([1], device=DEVICE))
    assert_same_bits(case.embedding(torch.tensor([1], device=DEVICE)).cpu(), case.weight[[1]].cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 512), (2, 33, 512), (512,)])
def test_gradients_have_the_bits_of_torch(layout, with_bias, shape):
    case = LAYOUTS[layout](weight_of(768, 512))
    results = []
    for ours in (True, False):
        x = x_of(shape).requires_grad_()
        bias = x_of((768,), 3).requires_grad_() if with_bias else None
        y = case.linear(x, bias) if ours else functional.linear(x, case.weight, bias)
        results.append([y, *torch.autograd.grad(y, [t for t in (x, bias) if t is not None], x_of(tuple(y.shape), 4))])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got.cpu(), expected.cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(layout):
    case = LAYOUTS[layout](weight_of(768, 512))
    x = x_of((5, 512)).float()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            assert_same_bits(case.linear(x).cpu(), functional.linear(x, case.weight).cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POLICIES)
def test_passes_that_decode_ahead(layout, name):
    chain = Chain(layout)
    with ops.gpu.use_policy(POLICIES[name]), torch.inference_mode():
        for seed in range(6):
            x = x_of((1 + 37 * (seed % 3), chain.cols), seed)
            assert_same_bits(chain(x).cpu(), chain.plain(x).cpu())
        outputs = [chain(x_of((4, chain.cols), seed)) for seed in range(20)]  # nothing waits in between
        for seed, got in enumerate(outputs):
            assert_same_bits(got.cpu(), chain.plain(x_of((4, chain.cols), seed)).cpu())


def test_the_hot_path_does_not_wait_for_the_device():
    chain = Chain("tiles")
    x = x_of((4, chain.cols))
    ids = torch.tensor([3, 5], device=DEVICE)
    for _ in range(2):
        chain(x)
        chain.cases[0].embedding(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain(x)
        chain.cases[0].embedding(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streams_and_threads(layout):
    chain = Chain(layout)
    inputs = [x_of((3, chain.cols), seed) for seed in range(8)]
    expected = [chain.plain(x).cpu() for x in inputs]
    torch.cuda.synchronize()
    results: dict[int, torch.Tensor] = {}

    def work(thread: int) -> None:
        streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]), torch.inference_mode():
                results[100 * thread + i] = chain(x)
        for stream in streams:
            stream.synchronize()

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 * len(inputs)
    for key, got in results.items():
        assert_same_bits(got.cpu(), expected[key % 100])


def test_models_that_take_turns_and_one_that_is_freed():
    first, second = Chain("tiles"), Chain("df11", (2048, 1024, 2048))
    x = x_of((3, 2048))
    expected = first.plain(x).cpu(), second.plain(x).cpu()
    for _ in range(3):
        assert_same_bits(first(x).cpu(), expected[0])
        assert_same_bits(second(x).cpu(), expected[1])
    del first
    gc.collect()
    for _ in range(3):
        assert_same_bits(second(x).cpu(), expected[1])


def capture(chain, x: torch.Tensor, pool=None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        for _ in range(2):
            chain(x)
    torch.cuda.current_stream(DEVICE).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = chain(x)
    return graph, out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POLICIES)
def test_graphs(layout, name):
    chain = Chain(layout)
    with ops.gpu.use_policy(POLICIES[name]), torch.inference_mode():
        x = x_of((2, chain.cols))
        graph, out = capture(chain, x)
        for seed in range(5):
            x.copy_(x_of((2, chain.cols), seed))
            graph.replay()
            expected = chain.plain(x)
            assert_same_bits(out.cpu(), expected.cpu())
            assert_same_bits(chain(x).cpu(), expected.cpu())  # and eager between replays


def test_a_graph_that_ends_before_what_was_decoded_ahead_is_used():
    """Nothing of the side stream is left open, and the next capture starts afresh."""
    chain = Chain("tiles")
    x = x_of((2, chain.cols))
    cases = chain.cases
    for _ in range(2):
        chain(x)
    pool = torch.cuda.graph_pool_handle()
    graphs = []
    for cut in (2, 4):
        chain.cases = cases[:cut]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = chain(x)
        graphs.append((graph, out, cut))
        chain.cases = cases
    for graph, out, cut in graphs:
        graph.replay()
        chain.cases = cases[:cut]
        assert_same_bits(out.cpu(), chain.plain(x).cpu())
    chain.cases = cases
    assert_same_bits(chain(x).cpu(), chain.plain(x).cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(layout, mode):
    chain = Chain(layout, (512, 1024, 512))
    plain = torch.compile(chain.plain, fullgraph=True, mode=mode)
    compiled = torch.compile(chain.__call__, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for seed in range(4):
            x = x_of((3, chain.cols), seed)
            assert_same_bits(compiled(x).cpu(), plain(x).cpu())


def test_inductor_graphs_that_break_between_linears():
    chain = Chain("tiles", (512, 1024, 512, 768))
    cases = chain.cases

    def step(x: torch.Tensor) -> torch.Tensor:
        x = functional.silu(cases[0].linear(x))
        torch._dynamo.graph_break()
        return cases[2].linear(functional.silu(cases[1].linear(x)))

    compiled = torch.compile(step, mode="reduce-overhead")
    with torch.inference_mode():
        for seed in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            x = x_of((3, chain.cols), seed)
            assert_same_bits(compiled(x).cpu(), step(x).cpu())


def test_opcheck():
    for layout in LAYOUTS:
        case = LAYOUTS[layout](weight_of(48, 200))
        x = x_of((2, 3, 200)).requires_grad_()
        torch.library.opcheck(case.linear_op, (x, *case.parts, None, *case.fields, "exact"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POLICIES)
def test_memory_is_what_is_promised(layout, name):
    chain = Chain(layout, (4096, 14336, 4096, 4096, 14336, 4096))
    x = x_of((2, chain.cols))
    with ops.gpu.use_policy(POLICIES[name]), torch.inference_mode():
        for _ in range(3):
            chain(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        chain(x)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(DEVICE) - before
        assert torch.cuda.memory_allocated(DEVICE) - before <= 1 << 20
    sizes = [size * 33 // 32 + 4096 if layout == "planes" else size for size in chain.sizes]  # planes: their workspace
    assert peak <= scratch_bytes(sizes, POLICIES[name]) + (1 << 20)


def test_freed_models_leave_no_memory():
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    chain = Chain("tiles")
    x = x_of((2, chain.cols))
    for _ in range(3):
        chain(x)
    del chain, x
    gc.collect()
    assert torch.cuda.memory_allocated(DEVICE) - before <= 1 << 20


def test_changes_in_place_are_seen():
    first, one = LAYOUTS["tiles"](weight_of(512, 512, 7)), LAYOUTS["tiles"](weight_of(768, 512))
    other = LAYOUTS["tiles"](-one.weight)
    x = x_of((2, 512))
    for _ in range(3):
        one.linear(first.linear(x))
    h = first.linear(x)  # decodes `one` ahead
    for mine, theirs in zip(one.parts, other.parts, strict=True):
        mine.copy_(theirs)
    assert_same_bits(one.linear(h).cpu(), functional.linear(h, other.weight).cpu())


@pytest.mark.parametrize("shape", [(64, 256), (1000, 1001), (4096, 1024)])
def test_conversions(shape):
    weight = weight_of(*shape)
    parts, how = encode(weight.cpu())
    encoded = ops.gpu.encode_planes(weight)
    assert encoded is not None
    for got, expected in zip(encoded.parts.values(), parts, strict=True):
        assert_same_bits(got.cpu(), expected)
    packed = ops.gpu.planes_to_tiles(tuple(encoded.parts.values()), *how)
    assert packed is not None
    rows_per_table, back = ops.gpu.tiles_to_planes(tuple(packed.values()), *shape)
    assert rows_per_table == how[3]
    for got, expected in zip(back.values(), parts, strict=True):
        assert_same_bits(got.cpu(), expected)


def test_slices_where_they_are_proven(tmp_path, monkeypatch):
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path))
    slices.clear()
    case = LAYOUTS["tiles"](weight_of(32000, 2048))
    with ops.gpu.use_policy(Policy(slice_bytes=32 << 20)), torch.inference_mode():
        for tokens in (1, 8, 64):
            x = x_of((tokens, 2048))
            for _ in range(2):
                assert_same_bits(case.linear(x).cpu(), functional.linear(x, case.weight).cpu())
    slices.clear()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    other = torch.device("cuda", 1)
    case = LAYOUTS["tiles"](weight_of(768, 512))
    parts = tuple(part.to(other) for part in case.parts)
    x = x_of((3, 512))
    for _ in range(3):
        here = case.linear(x)
        there = ops.tiles_linear(x.to(other), *parts, None, 768, 512, "exact")
        assert_same_bits(here.cpu(), functional.linear(x, case.weight).cpu())
        assert_same_bits(there.cpu(), functional.linear(x.to(other), case.weight.to(other)).cpu())
