"""Linears that share their input, on CPU tensors through the emulation: one launch, the bits of single products."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import bitforbit
from bitforbit import nn as bnn
from bitforbit.cuda.fused import reference
from bitforbit.cuda.fused.order import choose_order
from bitforbit.nn import siblings
from bitforbit.ops import gpu, stats
from bitforbit.ops.gpu import Policy, fused, runtime
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from helpers.gpu_weights import words
from torch_helpers import assert_same_bits, gaussian

COLS = 640


class Attention(nn.Module):
    """q, k and v, then what mixes them."""

    def __init__(self, rows: tuple[int, int, int] = (128, 48, 80), bias: bool = False) -> None:
        super().__init__()
        for name, count in zip(("q_proj", "k_proj", "v_proj"), rows, strict=True):
            self.add_module(name, nn.Linear(COLS, count, bias=bias))
        self.o_proj = nn.Linear(sum(rows), COLS, bias=False)
        self.skip: set[str] = set()

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        other = x if other is None else other
        parts = [
            getattr(self, name)(x if name == "q_proj" else other)
            for name in ("q_proj", "k_proj", "v_proj")
            if name not in self.skip
        ]
        return torch.cat(parts, -1)


@pytest.fixture
def emulated() -> Iterator[EmulatedLauncher]:
    launcher = EmulatedLauncher(3)
    with gpu.emulate(EmulatedQueue(launcher)):
        yield launcher
        gpu.clear()


@pytest.fixture
def model(emulated: EmulatedLauncher) -> Attention:
    torch.manual_seed(0)
    made = Attention(bias=True).bfloat16().requires_grad_(False)
    bitforbit.compress_model(made, mode="fused")
    return bnn.set_layout(made, "tiles")


def products(launcher: EmulatedLauncher) -> int:
    """Launches of fused products since the last time."""
    count = sum(kernel == "fused_linear" for kernel, _ in launcher.launches)
    launcher.launches.clear()
    return count


def alone(model: Attention, x: torch.Tensor) -> torch.Tensor:
    with gpu.use_policy(Policy(grouped=False)):
        return model(x)


def test_together_after_the_first_pass(model, emulated):
    x = gaussian((2, 3, COLS))
    expected = alone(model, x)
    assert products(emulated) == 3
    for launches in (3, 1, 1):
        x = x.clone()
        stats.reset()
        assert_same_bits(model(x), expected)
        assert products(emulated) == launches
        assert stats.snapshot()["fused"].linears == 3
    plain = bitforbit.decompress_model(copy.deepcopy(model))
    torch.testing.assert_close(expected, plain(x), atol=0.02, rtol=0.02)


def test_the_order_is_the_family_s(model, emulated):
    """Alone, each sums as the family does, also where its own shape asks for another order."""
    x = gaussian((5, COLS))
    properties = EmulatedQueue(emulated).properties
    order = choose_order((128, 48, 80), COLS, properties)
    assert all(choose_order((rows,), COLS, properties) != order for rows in (128, 48, 80))
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(model, name)
        expected = reference.linear(words(x), words(linear.weight.data), order, words(linear.bias))
        with gpu.use_policy(Policy(grouped=False)):
            np.testing.assert_array_equal(words(linear(x)), expected)


@pytest.mark.parametrize("tokens", [1, 2, 8, 64])
def test_a_token_in_any_company(model, tokens):
    x = gaussian((64, COLS))
    expected = alone(model, x)
    for _ in range(2):
        assert_same_bits(model(x[:tokens].clone()), expected[:tokens])


def test_many_tokens_are_decoded(model, emulated):
    x = gaussian((65, COLS))
    plain = bitforbit.decompress_model(copy.deepcopy(model))
    emulated.launches.clear()
    for _ in range(2):
        assert_same_bits(model(x), plain(x))
    assert products(emulated) == 0
    few = gaussian((64, COLS))
    for _ in range(2):
        model(few)
    assert_same_bits(model(x), plain(x))


def test_a_sibling_that_is_not_called(model, emulated):
    model(gaussian((1, COLS)))
    model.skip = {"v_proj"}
    products(emulated)
    x = gaussian((1, COLS))
    first = alone(model, x)
    products(emulated)
    counts = []
    for _ in range(4):
        x = x.clone()
        assert_same_bits(model(x), first)
        counts.append(products(emulated))
    assert counts == [1, 2, 1, 1]  # in vain; learned again; q and k


def test_results_do_not_outlive_their_input(model):
    model(gaussian((1, COLS)))
    x = gaussian((1, COLS))
    model.q_proj(x)
    (_, k), (_, v) = siblings._local.calls._results.products.values()
    results = [weakref.ref(k), weakref.ref(v)]
    del k, v
    assert all(result() is not None for result in results)
    del x
    gc.collect()
    assert all(result() is None for result in results)
    assert not siblings._local.calls._results.family.runs


def test_results_are_of_this_input_only(model):
    for change in ("other", "in place", "data", "view"):
        x, other = gaussian((2, COLS)), gaussian((2, COLS), seed=5)
        for _ in range(2):
            model(gaussian((2, COLS)))
        model.q_proj(x)
        if change == "other":
            x = other
        elif change == "in place":
            x.copy_(other)
        elif change == "data":
            x.data = other
        else:
            x = x[:]
        for name in ("k_proj", "v_proj"):
            assert_same_bits(getattr(model, name)(x), getattr(model, name)(x.clone()))


def test_weights_that_change(model):
    other = Attention(bias=True).bfloat16().requires_grad_(False)
    for p in other.parameters():
        p.data.mul_(3)
    compressed = bnn.set_layout(bitforbit.compress_model(copy.deepcopy(other), mode="fused"), "tiles")
    x = gaussian((2, COLS))
    for _ in range(3):
        model(x.clone())
    expected = alone(compressed, x)
    model.q_proj(x)
    model.load_state_dict(compressed.state_dict())
    assert_same_bits(model.k_proj(x), expected[:, 128:176])  # not what was computed before
    for _ in range(3):
        assert_same_bits(model(x.clone()), expected)
    model.q_proj(x)
    model.k_proj.bias.data.zero_()  # hidden from torch
    with torch.no_grad():
        model.v_proj.bias.zero_()
    assert_same_bits(model.v_proj(x), alone(model, x)[:, 176:])


def test_another_input_for_keys_and_values(model, emulated):
    """As in cross attention."""
    x, other = gaussian((2, COLS)), gaussian((2, COLS), seed=5)
    with gpu.use_policy(Policy(grouped=False)):
        expected = model(x, other)
    products(emulated)
    for launches in (3, 2, 2):
        assert_same_bits(model(x.clone(), other.clone()), expected)
        assert products(emulated) == launches


def test_gradients_and_adapters(model, emulated):
    model(gaussian((2, COLS)))
    plain = bitforbit.decompress_model(copy.deepcopy(model))
    emulated.launches.clear()
    ours, theirs = (gaussian((2, COLS)).requires_grad_() for _ in range(2))
    grad = gaussian((2, 256), seed=9)
    for each, x in ((model, ours), (plain, theirs)):
        each(x).backward(grad)
    assert products(emulated) == 3
    assert_same_bits(ours.grad, theirs.grad)
    assert_same_bits(model(ours.detach()), model(ours).detach())
    # Products may be written to, also where that is recorded.
    x = gaussian((2, COLS))
    for _ in range(2):
        q, k = model.q_proj(x), model.k_proj(x)
        v = model.v_proj(x)
    scale = torch.ones(128, dtype=torch.bfloat16, requires_grad=True)
    product = q * scale
    k.zero_()
    v += v
    product.sum().backward()
    q.mul_(scale)
    assert q.requires_grad


def test_trained_biases(model):
    model(gaussian((2, COLS)))
    x = gaussian((2, COLS))
    expected = alone(model, x)
    model.k_proj.bias.requires_grad_()
    for _ in range(3):
        out = model(x.clone())
        assert_same_bits(out.detach(), expected)
        model.k_proj.bias.grad = None
        out.sum().backward()
        assert_same_bits(model.k_proj.bias.grad, torch.full((48,), 2.0, dtype=torch.bfloat16))


def test_inference_mode(model, emulated):
    """Inference tensors have no count of changes."""
    expected = alone(model, gaussian((2, COLS)))
    products(emulated)
    with torch.inference_mode():
        for _ in range(2):
            assert_same_bits(model(gaussian((2, COLS)).clone()), expected)
            assert products(emulated) == 3
        with gpu.use_policy(Policy(grouped_in_inference_mode=True)):
            for launches in (3, 1):
                assert_same_bits(model(gaussian((2, COLS)).clone()), expected)
                assert products(emulated) == launches
    x = gaussian((2, COLS))
    model(x.clone())
    with torch.inference_mode():
        model.q_proj(x)
    assert not model.k_proj(x).is_inference()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(model, backend):
    x = gaussian((2, COLS))
    expected = alone(model, x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        assert_same_bits(compiled(x.clone()), expected)
        assert_same_bits(model(x.clone()), expected)


def test_copies(model, emulated):
    x = gaussian((2, COLS))
    expected = alone(model, x)
    for _ in range(2):
        model(x.clone())
    copied = copy.deepcopy(model)
    loaded = bnn.set_layout(pickle.loads(pickle.dumps(model)), "tiles")
    single = copy.deepcopy(model.k_proj)
    products(emulated)
    for each in (copied, loaded):
        families = {id(getattr(each, name)._bitforbit_siblings.family) for name in ("q_proj", "k_proj", "v_proj")}
        assert len(families) == 1
        assert families != {id(model.q_proj._bitforbit_siblings.family)}
        for launches in (3, 1):
            assert_same_bits(each(x.clone()), expected)
            assert products(emulated) == launches
    assert_same_bits(single(x), expected[:, 128:176])
    assert gc.collect() is not None
    parts = weakref.ref(copied.q_proj.tiles__weight)
    del copied, each
    assert parts() is None  # nothing keeps a model in memory


def test_hooks_and_wrappers(model, emulated):
    class Wrapper(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 1

    x = gaussian((2, COLS))
    expected = alone(model, x)
    seen = []
    model.k_proj.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    model.v_proj = Wrapper(model.v_proj)
    for launches in (3, 1):
        products(emulated)
        out = model(x.clone())
        assert products(emulated) == launches
        assert_same_bits(out[:, :176], expected[:, :176])
        assert_same_bits(out[:, 176:], expected[:, 176:] + 1)
        assert_same_bits(seen[-1], expected[:, 128:176])
    model.v_proj.base.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    double = model.v_proj.base(x)
    for _ in range(3):
        assert_same_bits(model(x.clone())[:, 176:], double + 1)


def test_modes_and_layouts(model, emulated):
    x = gaussian((2, COLS))
    plain = bitforbit.decompress_model(copy.deepcopy(model))
    for _ in range(2):
        model(x.clone())
    bnn.set_mode(model, "exact")
    products(emulated)
    for _ in range(2):
        assert_same_bits(model(x.clone()), plain(x))
    assert products(emulated) == 0
    bnn.set_mode(model, "fused")
    before = model(x.clone())
    bnn.set_layout(model.k_proj, "planes")
    for _ in range(3):
        mixed = model(x.clone())
        assert_same_bits(mixed[:, :128], before[:, :128])
        assert_same_bits(mixed[:, 176:], before[:, 176:])
    with pytest.raises(bitforbit.errors.UsageError, match=r"shape \[..., 640\]"):
        model.q_proj(x[:, 1:])
    with pytest.raises(bitforbit.errors.UsageError, match="expected x of dtype"):
        model.q_proj(x.float())
    bitforbit.decompress_model(model)
    assert not any("_bitforbit_siblings" in module.__dict__ for module in model.modules())


def test_captures(model, emulated, monkeypatch):
    """In name only: nothing is uploaded in one, and nothing that was computed outside is used."""
    place = runtime.current_place(torch.device("cpu"))

    def captures(number: int) -> None:
        now = runtime.Place(place.device, place.stream, number)
        monkeypatch.setattr(runtime, "current_place", lambda device: now)

    x = gaussian((2, COLS))
    expected = model(x)
    captures(1)
    products(emulated)
    assert_same_bits(model(x.clone()), expected)
    assert products(emulated) == 1
    captures(0)
    model.q_proj(x)
    captures(2)
    products(emulated)
    assert_same_bits(model.k_proj(x), expected[:, 128:176])
    assert products(emulated) == 1
    captures(0)
    for _ in range(2):
        model(x.clone())
    for key, table in list(fused._tables.items()):
        if len(table.group.rows) > 1:
            monkeypatch.delitem(fused._tables, key)
    captures(3)
    products(emulated)
    assert_same_bits(model(x.clone()), expected)
    assert products(emulated) == 3
    captures(0)


def test_threads(model):
    x = [gaussian((2, COLS), seed=seed) for seed in range(4)]
    expected = [alone(model, each) for each in x]

    def run(i: int) -> bool:
        return all(torch.equal(model(x[i].clone()), expected[i]) for _ in range(4))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_who_may_be_multiplied_together():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(64, 128, bias=False), nn.Linear(64, 64, bias=False)
            self.v_proj = None
            self.gate_proj = self.up_proj = nn.Linear(64, 128, bias=False)
            self.w1, self.w3 = nn.Linear(64, 128, bias=False), nn.Linear(128, 128, bias=False)
            self.query, self.key = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)

    model = bitforbit.compress_model(Mixed().bfloat16(), skip=["key"])
    found = {name: getattr(module, "_bitforbit_siblings", None) for name, module in model.named_children()}
    groups = {name: each and each.group for name, each in found.items()}
    assert groups.pop("q_proj") == groups.pop("k_proj") == (128, 64)
    assert groups.pop("gate_proj") is None
    assert set(groups.values()) == {None}


def test_changes_in_inference_mode_are_counted(model):
    x = gaussian((2, COLS))
    for _ in range(2):
        model(x.clone())
    model.q_proj(x)
    with torch.inference_mode():
        x.mul_(2)
    assert_same_bits(model.k_proj(x), alone(model, x)[:, 128:176])
