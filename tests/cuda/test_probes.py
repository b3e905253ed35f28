"""The probe kernels of tests/gpu through a queue, emulated and real: parameters, order of work, shared memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitforbit.cuda import compiler, sources
from bitforbit.cuda.kernel import LaunchConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from probes import PARAMETERS, REVERSE, SCALE, TEXT, scale_config


def test_parameters(queue: Any) -> None:
    out = queue.empty(32)
    arguments = (out.address, 2**32 - 1, -7, 2**64 - 2, 2.5)
    queue.launch(PARAMETERS, LaunchConfig.linear(1, 32), *arguments)
    words = np.frombuffer(queue.download(out), np.uint64)
    assert words.tolist() == [2**32 - 1, 2**64 - 7, 2**64 - 2, 2560]


@pytest.mark.parametrize("count", [1, 255, 256, 1000])
def test_work_takes_effect_in_order(queue: Any, count: int) -> None:
    data = queue.upload(np.arange(count, dtype=np.uint32).tobytes())
    queue.launch(SCALE, scale_config(count), data.address, 3, 1, count)
    queue.launch(REVERSE, LaunchConfig.linear(1, 256, 4 * count), data.address, count)
    queue.launch(SCALE, scale_config(count), data.address, 2, 0, count)
    got = np.frombuffer(queue.download(data), np.uint32)
    np.testing.assert_array_equal(got, 2 * (3 * np.arange(count, dtype=np.uint32)[::-1] + 1))


def test_large_shared_memory(queue: Any) -> None:
    count = queue.properties.shared_bytes_per_block // 4
    data = queue.upload(np.arange(count, dtype=np.uint32).tobytes())
    queue.launch(REVERSE, LaunchConfig.linear(1, 256, 4 * count), data.address, count)
    assert np.frombuffer(queue.download(data), np.uint32).tolist() == list(range(count))[::-1]


def test_memory(queue: Any) -> None:
    assert queue.download(queue.upload(b"")) == b""
    assert queue.download(queue.zeros(5)) == bytes(5)
    assert set(queue.download(queue.empty(300))) == {0xA5}
    buffer = queue.upload(bytes(range(200)))
    assert queue.download(buffer, 3) == b"\0\1\2"
    assert buffer.address % 256 == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
def test_the_text_compiles(arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    assert compiler.compile(sources.text(TEXT), arch).startswith(b"\x7fELF")
