from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitforbit.ops import direct
from torch_helpers import assert_same_bits, encode, gaussian


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


X = gaussian((2, 96), seed=1)

PLAIN = {"ordinary": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
WATCHED = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": torch.profiler.profile,
    "functions": Functions,
    "dispatch": Dispatched,
    "fake": FakeTensorMode,
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_calls(name):
    with PLAIN[name]():
        assert direct._is_plain_call(X, None)
        assert direct._is_plain_call(X, gaussian((5,)))


@pytest.mark.parametrize("name", WATCHED)
def test_watched_calls(name):
    context: AbstractContextManager[object] = WATCHED[name]()
    with context:
        assert not direct._is_plain_call(X, None)
    assert direct._is_plain_call(X, None)


def test_inputs_that_want_the_operators():
    grad = gaussian((2, 96)).requires_grad_()
    assert not direct._is_plain_call(grad, None)
    assert not direct._is_plain_call(X, grad)
    assert not direct._is_plain_call(X.as_subclass(Subclass), None)
    assert not direct._is_plain_call(X.to("meta"), None)
    with torch.no_grad():
        assert direct._is_plain_call(grad, grad)
    seen = []
    torch.func.vmap(lambda x: seen.append(direct._is_plain_call(x, None)) or x)(X)
    assert seen == [False]


@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_same_results(mode):
    parts, how = encode(gaussian((40, 96)))
    with Dispatched() as dispatched:
        expected = direct.linear(X, *parts, None, *how, mode), direct.embedding(torch.tensor([3, 9]), *parts, *how)
    assert {"bitforbit::linear", "bitforbit::embedding"} <= set(dispatched.seen)
    got = direct.linear(X, *parts, None, *how, mode), direct.embedding(torch.tensor([3, 9]), *parts, *how)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
