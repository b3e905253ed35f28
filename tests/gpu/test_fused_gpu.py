"""Mode fused on a real GPU: the bits of its order, no worse than cuBLAS, in any company, on any stream, in graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

import bitforbit
from bitforbit import ops
from bitforbit.cuda.fused import linear as kernels
from bitforbit.cuda.fused.order import Order
from bitforbit.errors import UsageError
from bitforbit.ops import stats
from bitforbit.ops.gpu import Policy, fused, queues
from helpers.gpu_weights import Case, tiles
from torch_helpers import assert_same_bits

DEVICE = torch.device("cuda", 0)
SHAPES = [(48, 200), (1024, 4096), (4096, 1024), (1000, 1001), (129, 14336)]
ALONE = Policy(grouped=False)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    ops.gpu.check_status(DEVICE)
    ops.gpu.clear()


def weight_of(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn((rows, cols), generator=generator, device=DEVICE) * 0.02).bfloat16()


def x_of(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


def plain(case: Case, x: torch.Tensor, bias: torch.Tensor | None, group: tuple[int, ...] = ()) -> torch.Tensor:
    """The same sums, from weights in BF16."""
    rows, cols = case.weight.shape
    queue = queues.queue_for(DEVICE)
    out = torch.empty((len(x), rows), dtype=torch.bfloat16, device=DEVICE)
    order = fused.order_of(group or (rows,), cols, queue.properties)
    if order.instruction != Order.instruction:
        pytest.skip(f"the kernel for plain weights has no {order.instruction}")
    at = 0 if bias is None else bias.data_ptr()
    kernels.plain(queue, case.weight.data_ptr(), rows, order, at, x.data_ptr(), len(x), out.data_ptr())
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 8, 17, 33, 64])
def test_the_bits_of_the_order(shape, tokens):
    case, bias, x = tiles(weight_of(*shape)), x_of(shape[:1], 3), x_of((tokens, shape[1]))
    for group in ((), (shape[0], 4096)):
        for each in (None, bias):
            got = ops.tiles_linear(x, *case.parts, each, *case.fields, "fused", group)
            assert_same_bits(got.cpu(), plain(case, x, each, group).cpu())


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_errors_are_no_larger_than_those_of_cublas(shape, tokens):
    """Root of the mean square against FP64. Both round to BF16 last, which is most of it: chance decides the rest."""
    case, x = tiles(weight_of(*shape)), x_of((tokens, shape[1]))
    exact = functional.linear(x.double(), case.weight.double())
    ours, theirs = (
        (out.double() - exact).square().mean().sqrt()
        for out in (case.linear(x, None, "fused"), functional.linear(x, case.weight))
    )
    assert ours <= 1.02 * theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_has_the_same_bits_in_any_company_and_every_time(shape):
    case, x = tiles(weight_of(*shape)), x_of((64, shape[1]))
    whole = case.linear(x, None, "fused")
    for _ in range(20):
        assert torch.equal(case.linear(x, None, "fused"), whole)
    for tokens in range(1, 65):
        begin = 64 - tokens
        assert torch.equal(case.linear(x[begin:], None, "fused"), whole[begin:])
    padded = torch.cat([torch.zeros_like(x[:9]), x[:5]])
    assert torch.equal(case.linear(padded, None, "fused")[9:], whole[:5])
    assert torch.equal(case.linear(x.t().contiguous().t(), None, "fused"), whole)


def test_more_tokens_have_the_bits_of_torch():
    case, x = tiles(weight_of(1024, 4096)), x_of((65, 4096))
    assert_same_bits(case.linear(x, None, "fused").cpu(), functional.linear(x, case.weight).cpu())


def test_nan_and_infinity():
    weight, x = weight_of(512, 1024), x_of((5, 1024))
    weight[3, 7], weight[4, 9] = float("nan"), float("inf")
    x[1, 3], x[2, 8] = float("nan"), float("-inf")
    got, expected = tiles(weight).linear(x, None, "fused"), functional.linear(x, weight)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())


def test_gradients_are_those_of_exact_mode():
    case = tiles(weight_of(768, 512))
    grads = []
    for mode in ops.MODES:
        x, bias = x_of((2, 8, 512)).requires_grad_(), x_of((768,), 3).requires_grad_()
        y = case.linear(x, bias, mode)
        grads.append(torch.autograd.grad(y, [x, bias], x_of(tuple(y.shape), 4)))
    for ours, theirs in zip(*grads, strict=True):
        assert_same_bits(ours.cpu(), theirs.cpu())


# --- linears that share their input ---------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 256)
        self.v_proj, self.o_proj = nn.Linear(1024, 256, bias=False), nn.Linear(1536, 1024, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        return self.o_proj(functional.silu(torch.cat(parts, -1)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(Attention(), Attention()).to(DEVICE, torch.bfloat16).requires_grad_(False)
    return bitforbit.compress_model(layers, mode="fused")


def alone(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with ops.gpu.use_policy(ALONE):
        return model(x)


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_together_and_alone(model, tokens):
    for seed in range(4):
        x = x_of((tokens, 1024), seed)
        with torch.no_grad():
            stats.reset()
            got = model(x)
            assert stats.snapshot()["fused"].linears == 8
        assert_same_bits(got.cpu(), alone(model, x).cpu())
        with torch.inference_mode():
            assert_same_bits(model(x).cpu(), got.cpu())


def test_the_hot_path_does_not_wait_for_the_device(model):
    x = x_of((4, 1024))
    for _ in range(2):
        model(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_and_threads(model):
    inputs = [x_of((3, 1024), seed) for seed in range(8)]
    expected = [alone(model, x).cpu() for x in inputs]
    torch.cuda.synchronize()
    results: dict[int, torch.Tensor] = {}

    def work(thread: int) -> None:
        streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]), torch.no_grad():
                results[100 * thread + i] = model(x)
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


def capture(
    model: nn.Module, x: torch.Tensor, passes: int, pool: object = None
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        for _ in range(passes):
            model(x)
    torch.cuda.current_stream(DEVICE).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = model(x)
    return graph, out


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("passes", [1, 3])
def test_graphs(model, context, passes):
    with context():
        pool = torch.cuda.graph_pool_handle()
        graphs = []
        for tokens in (2, 64):
            x = x_of((tokens, 1024))
            graphs.append((x, *capture(model, x, passes, pool)))
        for seed in range(5):
            for x, graph, out in graphs:
                x.copy_(x_of(tuple(x.shape), seed))
                graph.replay()
                got = out.cpu()
                assert_same_bits(got, alone(model, x).cpu())
                assert_same_bits(model(x).cpu(), got)  # and eager between replays


def test_replays_beside_each_other_and_beside_eager_products(model):
    """Every graph has a workspace of its own."""
    with torch.no_grad():
        inputs = [x_of((2, 1024), seed) for seed in range(2)]
        graphs = [capture(model, x, 2) for x in inputs]
        expected = [alone(model, x).cpu() for x in inputs]
        streams = [torch.cuda.Stream(DEVICE) for _ in graphs]
        torch.cuda.synchronize()
        for _ in range(50):
            for stream, (graph, _) in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            eager = model(inputs[0])
        torch.cuda.synchronize()
        for (_, out), each in zip(graphs, expected, strict=True):
            assert_same_bits(out.cpu(), each)
        assert_same_bits(eager.cpu(), expected[0])


def test_a_capture_needs_a_run_before():
    case, x = tiles(weight_of(768, 512, 5)), x_of((2, 512))
    tiles(weight_of(768, 512, 6)).linear(x, None, "fused")  # the kernel is compiled
    torch.cuda.synchronize()
    with pytest.raises(UsageError, match="run the model once, then capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        case.linear(x, None, "fused")
    torch.cuda.synchronize()
    assert_same_bits(case.linear(x, None, "fused").cpu(), plain(case, x, None).cpu())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(model, mode):
    pytest.importorskip("triton")

    def step(x: torch.Tensor) -> torch.Tensor:
        layer = model[0]
        return torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1)

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            x = x_of((3, 1024), seed)
            got = compiled(x).cpu()
            with ops.gpu.use_policy(ALONE):
                assert_same_bits(got, step(x).cpu())


def test_freed_models_leave_little_memory():
    gc.collect()
    torch.cuda.synchronize()
    x = x_of((2, 1024))
    before = torch.cuda.memory_allocated(DEVICE)
    torch.manual_seed(0)
    model = bitforbit.compress_model(Attention().to(DEVICE, torch.bfloat16).requires_grad_(False), mode="fused")
    for _ in range(3):
        model(x)
    del model
    assert torch.cuda.memory_allocated(DEVICE) - before <= 16 << 20  # workspace and tables


def test_a_model_on_the_gpu_writes_the_same_tokens_every_time():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).requires_grad_(False).eval()
    bitforbit.compress_model(model, mode="fused")
    ids = torch.randint(3, 500, (2, 12), device=DEVICE)
    stats.reset()
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    first, second = (model.generate(ids, attention_mask=torch.ones_like(ids), **options) for _ in range(2))
    assert torch.equal(first, second)
    counts = stats.snapshot()
    assert counts["decoded"].linears == 0
    assert counts["fused"].linears == 2 * 16 * (3 * 7 + 1)
