"""Exact attention in blocks, for layers with softcap or sink logits."""

from __future__ import annotations

import pytest
import torch

from bitforbit.attention.online import OnlineSoftmax, attend_exact
from bitforbit.kv.naive import attention
from helpers.kv_paths import one_thread

__all__ = ["one_thread"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 5, 300])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [None, (0.5, -1.0, 3.0, 0.0)])
def test_against_materialised_scores(
    causal: bool, queries: int, softcap: float | None, sinks: tuple[float, ...] | None
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 2, 700, 16), torch.randn(2, 2, 700, 24)
    mask = torch.rand(2, 1, queries, 700) < 0.5
    logits = None if sinks is None else torch.tensor(sinks)
    out, lse = attend_exact(q, k, v, mask, causal=causal, scaling=0.25, softcap=softcap, sinks=logits)
    seen = mask & torch.ones(queries, 700, dtype=torch.bool).tril(700 - queries) if causal else mask
    for row in range(2):
        keys, values = (x[row].double().repeat_interleave(2, 0) for x in (k, v))
        expected = attention(q[row].double(), keys, values, seen[row], 0.25, softcap, logits)
        assert (out[row].double() - expected).abs().max() < 1e-5
    plain = attend_exact(q, k, v, mask, causal=causal, scaling=0.25, softcap=softcap)[1]
    expected_lse = plain if logits is None else torch.logaddexp(plain, logits[:, None])
    assert torch.allclose(lse, expected_lse)


def test_nothing_seen() -> None:
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 40, 16)
    out, lse = attend_exact(q, k, k, torch.zeros(1, 1, 3, 40, dtype=torch.bool), causal=False, scaling=1.0)
    assert not out.any()
    assert (lse == float("-inf")).all()
    out, lse = attend_exact(q, k[:, :, :0], k[:, :, :0], None, causal=True, scaling=1.0)
    assert not out.any()
    assert (lse == float("-inf")).all()


def test_merging_with_what_was_attended() -> None:
    q, k, v = torch.randn(4, 3, 16), torch.randn(2, 90, 16), torch.randn(2, 90, 16)
    whole, part = OnlineSoftmax(q, 2, 0.25), OnlineSoftmax(q, 2, 0.25)
    whole.add(k, v)
    part.add(k[:, :50], v[:, :50])
    seeded = OnlineSoftmax(q, 2, 0.25, seed=(part.result(), part.logsumexp()))
    seeded.add(k[:, 50:], v[:, 50:])
    assert torch.allclose(seeded.result(), whole.result(), atol=1e-6)
    assert torch.allclose(seeded.logsumexp(), whole.logsumexp(), atol=1e-6)
    empty = OnlineSoftmax(q, 2, 0.25)
    seeded = OnlineSoftmax(q, 2, 0.25, seed=(empty.result(), empty.logsumexp()))
    seeded.add(k, v)
    assert torch.equal(seeded.result(), whole.result())
