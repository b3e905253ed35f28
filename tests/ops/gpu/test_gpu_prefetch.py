"""The schedule of decoding ahead, on simulated streams that do the work late, in any order that events allow."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from simulated_streams import RaceError, Simulation

from bitforbit.ops.gpu.policy import Policy, scratch_bytes
from bitforbit.ops.gpu.prefetch import Prefetcher, Successors
from bitforbit.ops.gpu.weights import Geometry, Weight

POLICIES = {
    "default": Policy(),
    "decode first": Policy(product_first=False),
    "join in the operator": Policy(join_at_use=False),
    "two ahead": Policy(ahead=2),
    "three ahead, little memory": Policy(ahead=3, scratch_bytes=2048),
    "none ahead": Policy(ahead=0),
    "not for few tokens": Policy(least_tokens=2),
}


@dataclass(frozen=True)
class Simulated(Geometry):
    """Decodes to copies of its first part's first byte."""

    @property
    def dtype(self):
        return torch.uint8

    def checked(self, parts):
        return parts

    def look_up(self, *arguments):
        raise NotImplementedError

    def decode(self, queue, parts, begin, end, out, workspace, status):
        simulation = queue.simulation
        source = [simulation.place(part) for part in parts]
        first, last = simulation.place_at(out, self.memory_bytes)

        def run():
            simulation.memory[first:last] = simulation.memory[source[0][0]]

        queue.enqueue(f"decode {self.rows}", run, source, [(first, last)])


class Model:
    """Weights in simulated memory, and products with them that are checked when they are done."""

    def __init__(self, simulation: Simulation, policy: Policy, rows: list[int]) -> None:
        self.simulation = simulation
        self.prefetcher = Prefetcher(simulation, Successors(), policy)
        self.values: list[int] = []
        self.weights: list[Weight] = []
        self.next_value = 0
        for n in rows:
            self.weights.append(self.create(n))
        self.outputs: list[torch.Tensor] = []
        self.checked = 0

    def create(self, rows: int) -> Weight:
        parts = tuple(self.simulation.bytes(16) for _ in range(4))
        self.values.append(0)
        weight = Weight(Simulated(rows, 64), parts)
        self.write(weight, len(self.values) - 1, in_place=False)
        return weight

    def write(self, weight: Weight, index: int, in_place: bool = True) -> None:
        """Change the weight in place on the main stream."""
        self.next_value = value = (self.next_value + 1) % 200
        begin, end = self.simulation.place(weight.parts[0])

        def run():
            self.simulation.memory[begin:end] = value

        self.simulation.main.enqueue(f"write {index}", run, [], [(begin, end)], in_place=in_place)
        weight.parts[0][:0].zero_()  # counts as a change for torch
        self.values[index] = value

    def replace(self, index: int) -> None:
        """Free a weight and make another one, maybe at the same address."""
        rows = self.weights[index].geometry.rows
        self.weights[index] = None
        self.weights[index] = self.create(rows)
        self.values[index] = self.values.pop()

    def use(self, index: int, tokens: int = 2) -> None:
        simulation, weight, value = self.simulation, self.weights[index], self.values[index]

        def product(matrix: torch.Tensor) -> torch.Tensor:
            out = simulation.bytes(32)
            place, target = simulation.place(matrix), simulation.place(out)
            assert place[1] - place[0] == weight.geometry.matrix_bytes

            def run():
                assert (simulation.memory[slice(*place)] == value).all(), f"weight {index} is not what it should be"
                simulation.memory[slice(*target)] = 0xCC
                self.checked += 1

            simulation.main.enqueue(f"product {weight.geometry.rows}", run, [place], [target])
            return out

        self.outputs.append(self.prefetcher.multiply(weight, tokens, product))
        del self.outputs[:-3]
        if simulation.capturing:
            assert not simulation.open_side_work


def play(simulation: Simulation, policy: Policy, seed: int) -> None:
    draw = random.Random(seed)
    model = Model(simulation, policy, [draw.randint(1, 20) for _ in range(6)])
    uses = 0
    for _ in range(8):
        order = list(range(6))
        surprise = draw.random()
        if surprise < 0.2:
            draw.shuffle(order)
        elif surprise < 0.4:
            del order[draw.randrange(6)]
        elif surprise < 0.5:
            order.insert(draw.randrange(6), draw.randrange(6))
        for index in order:
            event = draw.random()
            if event < 0.05:
                model.write(model.weights[other := draw.randrange(6)], other)
            elif event < 0.1:
                model.replace(draw.randrange(6))
            model.use(index, tokens=draw.choice((1, 2)))
            uses += 1
    model.prefetcher.discard()
    simulation.synchronize()
    assert model.checked == uses
    model.weights.clear()
    model.outputs.clear()
    assert simulation.used == 0


def play_often(make: Callable[[int], Simulation], policy: Policy) -> None:
    for seed in range(30):
        play(make(seed), policy, seed)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("capturing", [False, True])
def test_every_product_sees_its_weight(name, capturing):
    play_often(lambda seed: Simulation(seed, pace=(0, 1, 3)[seed % 3], capturing=capturing), POLICIES[name])


class NoFollow(Simulation):
    def follow(self):
        pass


class NoJoin(Simulation):
    def join(self, mark):
        pass


class ForkTooLate(Simulation):
    """The side stream waits for what the main stream had before the last fork only."""

    def fork(self):
        before = dict(self.main.clock)
        self._noted, self._later = getattr(self, "_later", {}), before


@pytest.mark.parametrize("broken", [NoFollow, NoJoin, ForkTooLate])
@pytest.mark.parametrize("policy", [Policy(), Policy(product_first=False)])
def test_the_simulation_shows_missing_events(broken, policy):
    with pytest.raises(RaceError):
        play_often(lambda seed: broken(seed, pace=0), policy)


def test_wrong_order_of_execution_gives_wrong_weights():
    """Without the check for races, too: some order that missing events allow makes a product wrong."""

    class Careless(NoJoin):
        def touch(self, queue, access):
            pass

    with pytest.raises(AssertionError, match="is not what it should be"):
        play_often(Careless, Policy())


def names(policy: Policy, capturing: bool = False) -> list[str]:
    simulation = Simulation(capturing=capturing)
    model = Model(simulation, policy, [1, 2, 3])
    for _ in range(2):
        simulation.names.clear()
        for index in range(3):
            model.use(index)
    return simulation.names


def test_the_second_pass_decodes_ahead():
    assert names(Policy()) == [
        "main: decode 1", "main: product 1", "side: decode 2",
        "main: product 2", "side: decode 3",
        "main: product 3",
    ]  # fmt: skip
    assert names(Policy(product_first=False)) == [
        "main: decode 1", "side: decode 2", "main: product 1",
        "side: decode 3", "main: product 2",
        "main: product 3",
    ]  # fmt: skip
    assert names(Policy(ahead=2)) == [
        "main: decode 1", "main: product 1", "side: decode 2", "side: decode 3", "main: product 2", "main: product 3"
    ]  # fmt: skip
    assert names(Policy(), capturing=True) == names(Policy())


def test_nothing_is_decoded_ahead_across_passes():
    simulation = Simulation()
    model = Model(simulation, Policy(ahead=3), [1, 2, 3])
    parts = simulation.used
    for _ in range(3):
        for index in range(3):
            model.use(index)
        model.outputs.clear()
        assert simulation.used == parts


def test_models_that_take_turns():
    """Each keeps its order; at most the first weight of the other one is decoded for nothing."""
    simulation = Simulation()
    model = Model(simulation, Policy(), list(range(1, 9)))
    for _ in range(3):
        for index in (*range(4), *range(4), *range(4, 8)):
            model.use(index)
    simulation.names.clear()
    for index in (*range(4), *range(4), *range(4, 8)):
        model.use(index)
    decoded = [name for name in simulation.names if "decode" in name]
    assert len(decoded) <= 12 + 1
    simulation.synchronize()


@pytest.mark.parametrize("policy", [Policy(), Policy(ahead=2), Policy(ahead=3, scratch_bytes=1500), Policy(ahead=0)])
def test_memory_is_what_is_promised(policy):
    rows = [4, 9, 1, 12, 5, 5, 7]
    simulation = Simulation()
    model = Model(simulation, policy, rows)
    parts = simulation.used
    sizes = [weight.nbytes for weight in model.weights]
    simulation.peak = 0
    for _ in range(3):
        for index in range(len(rows)):
            model.use(index)
            model.outputs.clear()
    outputs = 2 * 64
    assert simulation.peak - parts <= scratch_bytes(sizes, policy) + outputs
    if policy == Policy():
        assert scratch_bytes(sizes) == sizes[3] + sizes[4]
        assert simulation.peak - parts >= scratch_bytes(sizes)


def test_scratch_bytes():
    assert scratch_bytes([]) == 0
    assert scratch_bytes([5]) == 5
    assert scratch_bytes([5, 7, 1]) == 12
    assert scratch_bytes([5, 7, 1], Policy(ahead=0)) == 7
    assert scratch_bytes([5, 7, 1], Policy(ahead=2)) == 13
    assert scratch_bytes([5, 7, 1], Policy(scratch_bytes=10)) == 10
    assert scratch_bytes([5, 7, 1], Policy(scratch_bytes=3)) == 7


def test_a_failed_decode_leaves_nothing_behind():
    simulation = Simulation()
    model = Model(simulation, Policy(), [1, 2, 3])
    for index in range(3):
        model.use(index)

    @dataclass(frozen=True)
    class Failing(Simulated):
        def decode(self, queue, parts, begin, end, out, workspace, status):
            super().decode(queue, parts, begin, end, out, workspace, status)
            raise RuntimeError("no")

    weight = model.weights[1]
    node = model.prefetcher._successors._nodes[weight.key]
    node._geometry = Failing(weight.geometry.rows, weight.geometry.cols)
    with pytest.raises(RuntimeError, match="no"):
        model.use(0)
    assert not simulation.open_side_work
    model.use(1)
    simulation.synchronize()


def test_too_little_memory_to_decode_ahead_is_no_error():
    simulation = Simulation()
    model = Model(simulation, Policy(), [1, 2, 3])
    for index in range(3):
        model.use(index)
    plenty = simulation.empty
    calls = []

    def scarce(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        calls.append(shape)
        if len(calls) % 2 == 0:
            raise torch.OutOfMemoryError("no memory")
        return plenty(shape, dtype)

    simulation.empty = scarce
    simulation.names.clear()
    for index in range(2):
        model.use(index)
    simulation.synchronize()
    assert not [name for name in simulation.names if name.startswith("side")]


def test_the_order_keeps_no_weight_alive():
    simulation = Simulation()
    successors = Successors()
    prefetcher = Prefetcher(simulation, successors, Policy())
    for _ in range(3000):
        weight = Weight(Simulated(1, 64), tuple(simulation.bytes(16) for _ in range(4)))
        successors.visit(weight)
    del weight
    assert simulation.used == 0
    assert len(successors) <= 1024
    prefetcher.discard()


def test_inference_tensors_are_not_decoded_ahead():
    """Torch does not count their changes."""
    simulation = Simulation()
    model = Model(simulation, Policy(), [1, 2])
    with torch.inference_mode():
        model.weights = [replace_parts(weight) for weight in model.weights]
    for _ in range(2):
        model.use(0)
        model.use(1)
    assert not [name for name in simulation.names if name.startswith("side")]


def replace_parts(weight: Weight) -> Weight:
    parts = tuple(torch.from_numpy(part.numpy()) for part in weight.parts)
    return Weight(replace(weight.geometry), parts)
