from __future__ import annotations

import pytest
import torch

from bitforbit import ops
from bitforbit.errors import UsageError


def test_layouts_of_gpus_need_a_gpu():
    parts = [torch.zeros(16, dtype=torch.uint8) for _ in range(4)]
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    for call in (
        lambda: ops.tiles_linear(x, *parts, None, 16, 64, "exact"),
        lambda: ops.tiles_decode(*parts, 16, 64, 0, 16),
        lambda: ops.df11_linear(x, *parts, None, 1024, 0, 16, 64, "exact"),
        lambda: ops.gpu.pack_tiles(torch.zeros(16, 64, dtype=torch.bfloat16)),
        lambda: ops.gpu.queue_for(torch.device("cpu")),
        lambda: ops.gpu.queue_for(torch.device("meta")),
    ):
        with pytest.raises(UsageError, match="to lie on a CUDA device, got"):
            call()
