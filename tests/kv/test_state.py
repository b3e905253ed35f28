from __future__ import annotations

import pytest
import torch

from bitforbit.attention.quantized import attend
from bitforbit.kv.naive import NaiveKivi
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_first(dtype):
    torch.manual_seed(0)
    spec = KiviSpec(k_bits=4, v_bits=2, group=32, residual=64, sink=3)
    B, H, Hq, D = 3, 2, 4, 64
    st = KvState(spec, B, H, D, dtype=dtype, device="cpu")
    start = [5, 0, 30]
    nv = NaiveKivi(spec, start)
    first = True
    for n in [200, 1, 1, 1, 7, 1, 700, 1, 1, 30] + [1] * 70:
        k, v = (torch.randn(B, H, n, D).to(dtype) for _ in range(2))
        q = torch.randn(B, Hq, n, D).to(dtype)
        st.append(k, v)
        nv.append(k, v)
        if first:
            m = (torch.arange(n)[None] >= torch.tensor(start)[:, None])[:, None, None, :].expand(B, 1, n, n).tril()
            st.set_padding(m)
            assert st.starts == tuple(start)
        first = False
        got = attend(q, st, None, scaling=0.125)
        exp = nv.attend(q, None, scaling=0.125)
        assert (got.double() - exp).abs().max() < {torch.float32: 1e-5}.get(dtype, 2e-2)
        st.flush()
        nv.flush()
        dk, dv = st.dequantized()
        for b in range(B):
            ek, ev = nv.rows[b].dequantized()
            assert torch.equal(dk[b, :, start[b] :], ek)
            assert torch.equal(dv[b, :, start[b] :], ev)
    for slots in (st.slots - 3, st.slots - 100, 600, 150, 80, 33, 20):
        st.crop(slots)
        nv.crop(slots)
        dk, dv = st.dequantized()
        for b in range(B):
            if slots > start[b]:
                ek, ev = nv.rows[b].dequantized()
                assert torch.equal(dk[b, :, start[b] :], ek)
                assert torch.equal(dv[b, :, start[b] :], ev)
