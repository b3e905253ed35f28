"""A cache on a real GPU against the naive one on the CPU, and NaN that is noticed without waiting for the device."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from bitforbit.errors import KvCacheError, NonFiniteKeysError
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState
from helpers.kv_states import Pair

SPECS = [KiviSpec(k_bits=4, v_bits=2, residual=64, sink=3), KiviSpec(k_bits=2, v_bits=8, residual=96, v_group=16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_random_schedules(spec: KiviSpec, dtype: torch.dtype) -> None:
    chance = random.Random(7)
    pair = Pair(spec, [0, 40, 3], 2, 6, 64, dtype=dtype, device="cuda")
    pair.call(700)
    for _ in range(8):
        for _ in range(chance.choice([1, 5, 70])):
            pair.call(1, mask=chance.random() < 0.5)
        pair.call(chance.choice([2, 9, 200]))
        pair.crop(chance.randrange(pair.state.slots - 150, pair.state.slots + 1))
        pair.reorder([chance.randrange(3) for _ in range(3)])


def test_nan_is_noticed_in_a_later_call() -> None:
    state = KvState(KiviSpec(residual=32), 1, 2, 64, dtype=torch.bfloat16, device="cuda", name="layer 5")
    x = torch.ones(1, 2, 100, 64, dtype=torch.bfloat16, device="cuda")
    bad = x.clone()
    bad[0, 1, 40, 7] = float("nan")
    state.append(bad, x)
    state.flush()
    twin = copy.deepcopy(state)
    torch.cuda.synchronize()
    state.append(x, x)
    with pytest.raises(NonFiniteKeysError, match=r"layer 5: expected finite keys.* in 1 groups"):
        state.flush()
    with pytest.raises(KvCacheError, match="whole"):
        state.append(x, x)
    twin.append(x, x)
    twin.flush()  # a copy counts on, and tells a call after its own look
    torch.cuda.synchronize()
    twin.append(x, x)
    with pytest.raises(NonFiniteKeysError):
        twin.flush()
    state.reset()
    for _ in range(3):
        state.append(x, x)
        state.flush()
        torch.cuda.synchronize()
    assert state.slots == 300
