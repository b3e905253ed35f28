"""No content of the parts makes a kernel touch other memory; what contradicts itself shows in the status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from df11_cases import OnDevice, gaussian, last_code_in_a_block_of_its_own, with_code_of, words_of

from bitforbit.codecs.df11 import Df11Unit, encode_unit
from cuda_shim.emulation import queue as emulated

HEADER_WORDS = 16
GAP_WORDS = 40
"""Per block."""


@pytest.fixture(scope="module")
def unit() -> Df11Unit:
    unit = encode_unit([gaussian(30_001, seed=4)])
    assert unit.num_blocks == 3
    return unit


def positions(device: OnDevice) -> Any:
    """The positions in the index, to be changed."""
    return device.host["index"].view("<u4")[HEADER_WORDS + GAP_WORDS * device.geometry.blocks :]


@pytest.mark.parametrize("step", [-1, 1, 100])
def test_wrong_position(queue: Any, unit: Df11Unit, step: int) -> None:
    device = OnDevice(queue, unit)
    positions(device)[1:2] += np.array(step).astype(np.uint32)
    device.upload()
    assert device.decode()[1] == 1


@pytest.mark.parametrize("thread", [1, 31, 32, 33, 255])
def test_wrong_gap(queue: Any, unit: Df11Unit, thread: int) -> None:
    device = OnDevice(queue, unit)
    bit = 5 * thread + 4
    device.host["index"].view("<u4")[HEADER_WORDS + GAP_WORDS + bit // 32] ^= np.uint32(1 << (31 - bit % 32))
    device.upload()
    assert device.decode()[1] == 1
    assert device.decode(0, 5)[1] == 0  # another block


def test_stream_that_ends_too_early(queue: Any, unit: Df11Unit) -> None:
    device = OnDevice(queue, unit)
    device.host["stream"][4096 + 1000 : 4096 + 1400] = 0xFF
    device.upload()
    assert device.decode()[1] == 1


def test_bits_that_start_no_code(queue: Any) -> None:
    """Entries left over in a table are legal where no data leads; a stream that leads there is not."""
    luts = np.zeros((3, 256), np.uint8)
    luts[0, :255], luts[0, 255] = 7, 255
    luts[1, :128], luts[1, 128:] = 255, 9
    luts[2, 7], luts[2, 9] = 1, 9
    stream = np.array([0xFF, 0x80] + [0] * 30, np.uint8)
    unit = Df11Unit(
        luts=luts, encoded_exponent=stream, sign_mantissa=np.zeros(248, np.uint8),
        output_positions=np.array([0, 248], "<u4").view(np.uint8), gaps=np.zeros(320, np.uint8),
        split_positions=np.empty(0, np.int64),
    )  # fmt: skip
    device = OnDevice(queue, unit)
    words, status = device.decode()
    assert (words >> 7).tolist() == [9] + [7] * 247
    assert status == 0
    device.host["stream"][1] = 0
    device.upload()
    assert device.decode()[1] == 1


def damaged_bytes(part: str, share: float) -> Callable[[OnDevice, np.random.Generator], None]:
    def damage(device: OnDevice, rng: np.random.Generator) -> None:
        array = device.host[part]
        at = rng.random(array.size) < share
        array[at] = rng.integers(0, 256, int(at.sum()))

    return damage


DAMAGE: dict[str, Callable[[OnDevice, np.random.Generator], None]] = {
    "stream": damaged_bytes("stream", 0.01),
    "another stream": damaged_bytes("stream", 1),
    "look-ups": damaged_bytes("tables", 0.02),
    "random tables": damaged_bytes("tables", 1),
    "gaps and positions": damaged_bytes("index", 0.05),
    "random index": damaged_bytes("index", 1),
}


@pytest.mark.parametrize("mode", ["memory", "races"])
@pytest.mark.parametrize("kind", ["gaussian", "two bits", "long", "no position"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_stays_inside(unit: Df11Unit, name: str, kind: str, mode: str) -> None:
    """Under AddressSanitizer, and with every access to shared memory watched."""
    rng = np.random.default_rng(len(name))
    units = {
        "gaussian": unit,
        "two bits": encode_unit([words_of(np.full(20_000, 3))]),
        "long": with_code_of({e: 1 << e for e in range(30)}, words_of(rng.integers(0, 12, 3000))),
        "no position": last_code_in_a_block_of_its_own(),
    }
    device = OnDevice(emulated(mode), units[kind])
    DAMAGE[name](device, rng)
    device.upload()
    elements = device.geometry.elements
    device.decode(guard=0)
    device.decode(3, elements - 1, offset=1, guard=0)
    device.rows(1, 50, (elements - 1) // 50, np.array([0, (elements - 1) // 50 - 1, 7]))
