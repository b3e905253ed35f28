"""torch.func and forward-mode differentiation see the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import bitforbit
from torch_helpers import assert_same_bits, gaussian

X, TANGENT = gaussian((3, 64), seed=1), gaussian((3, 64), seed=2)


def pair(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False)).to(dtype).requires_grad_(False)
    return bitforbit.compress_model(copy.deepcopy(plain)), plain


def forward_mode(model: nn.Module) -> torch.Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, TANGENT))).tangent
    assert tangent is not None
    return tangent


TRANSFORMS: dict[str, Callable[[nn.Module], torch.Tensor]] = {
    "forward mode": forward_mode,
    "jvp": lambda model: torch.func.jvp(model, (X,), (TANGENT,))[1],
    "jacrev": lambda model: torch.func.jacrev(lambda x: model(x).sum(0))(X),
    "jacfwd": lambda model: torch.func.jacfwd(lambda x: model(x).sum(0))(X[:1]),
    "vmap": lambda model: torch.func.vmap(model)(X[:, None]),
    "per-sample gradients": lambda model: torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(X),
}


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_plain_model_s_results(name: str, mode: str) -> None:
    model, plain = pair()
    bitforbit.nn.set_mode(model, mode)
    assert_same_bits(TRANSFORMS[name](model), TRANSFORMS[name](plain))
