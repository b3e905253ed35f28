"""Planned bytes of caches against those of the caches themselves."""

from __future__ import annotations

import pytest

from bitforbit.errors import KvSpecError, PlanError
from bitforbit.kv.spec import KiviSpec
from bitforbit.planner import KvSetting, LayerCache

torch = pytest.importorskip("torch")

SPECS = [
    KiviSpec(2, 2),
    KiviSpec(4, 2, sink=4),
    KiviSpec(8, 8, group=64, residual=64),
    KiviSpec(4, 4, group=32, v_group=16, residual=32, sink=3),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [1, 31, 128, 129, 132, 133, 640, 700, 1600])
def test_bytes_of_a_state(spec: KiviSpec, tokens: int) -> None:
    from bitforbit.kv.state import KvState

    state = KvState(spec, 2, 3, 64, dtype=torch.bfloat16, device="cpu")
    x = torch.randn(2, 3, tokens, 64, dtype=torch.bfloat16)
    state.append(x, x)
    state.flush()
    for _ in range(3):
        state.append(x[:, :, :1], x[:, :, :1])
        state.flush()
    planned = LayerCache.of(KvSetting("x", spec), 3, 64, 2, None).resident(tokens + 3, 2)
    # The row starts take a few bytes; a window that is not full yet grows by steps of its own.
    growing = tokens + 3 <= (spec.residual or 0)
    slack = LayerCache(None, 3, 64, 2).resident(max(64, tokens), 2) if growing else 64
    assert planned <= state.nbytes <= planned + slack


def test_own_cache() -> None:
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache()
    x = torch.zeros(2, 3, 77, 64, dtype=torch.bfloat16)
    cache.update(x, x, 0)
    layer = LayerCache.of(KvSetting("16"), 3, 64, 2, None)
    assert layer.resident(77, 2) == cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes
    assert layer.read(77, 2) == layer.resident(77, 2)


def test_windows_stay_the_models_own() -> None:
    layer = LayerCache.of(KvSetting("2", KiviSpec(2, 2)), 4, 128, 2, 1024)
    assert layer.spec is None
    assert layer.resident(100_000) == layer.resident(1024) == 1024 * layer.token_bytes


def test_a_step_reads_the_true_bits() -> None:
    """At length, 2 bits in groups of 32 are 3 bits per element."""
    layer = LayerCache.of(KvSetting("2", KiviSpec(2, 2)), 8, 128, 2, None)
    tokens = 1 << 20
    assert 8 * layer.read(tokens) / (tokens * 2 * 8 * 128) == pytest.approx(3.0, rel=0.01)
    assert layer.resident(tokens) >= layer.read(tokens)


@pytest.mark.parametrize(("head_dim", "group"), [(80, 16), (96, 32), (48, 16), (112, 16)])
def test_groups_fit_the_head(head_dim: int, group: int) -> None:
    layer = LayerCache.of(KvSetting("4", KiviSpec(4, 4)), 2, head_dim, 2, None)
    assert layer.spec is not None
    assert layer.spec.value_group == group


def test_refused() -> None:
    with pytest.raises(KvSpecError, match="multiple of 16"):
        LayerCache.of(KvSetting("4", KiviSpec(4, 4)), 2, 72, 2, None)
    with pytest.raises(PlanError, match="tokens >= 0"):
        LayerCache(None, 2, 64, 2).resident(-1)
