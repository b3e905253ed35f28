"""The launcher on a real GPU: torch's memory and context, threads, streams, graphs, devices, the cache."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from probes import PARAMETERS, REVERSE, SCALE, TEXT, scale_config

from bitforbit.cuda import cache, compiler, device, driver, sources
from bitforbit.cuda.kernel import Kernel, LaunchConfig
from bitforbit.cuda.launcher import CudaLauncher, for_device
from bitforbit.errors import GpuNotFoundError, KernelBuildError, KernelLaunchError

torch = pytest.importorskip("torch")

COUNT = 100_000


@pytest.fixture
def launcher() -> CudaLauncher:
    return for_device(0)


@pytest.fixture
def words() -> Iterator[torch.Tensor]:
    """0, 1, 2, ... as int32 on the GPU."""
    yield torch.arange(COUNT, dtype=torch.int32, device="cuda:0")
    torch.cuda.synchronize()


def scale(launcher: CudaLauncher, words: torch.Tensor, factor: int, addend: int = 0, stream: int | None = None) -> None:
    """words = words * factor + addend"""
    stream = torch.cuda.current_stream(words.device).cuda_stream if stream is None else stream
    launcher.launch(SCALE, scale_config(words.numel()), (words.data_ptr(), factor, addend, words.numel()), stream)


def fresh(launcher: CudaLauncher) -> CudaLauncher:
    """A launcher that has loaded nothing."""
    return CudaLauncher(launcher.ordinal, driver.get(), launcher.properties)


def test_properties_are_torchs() -> None:
    found, expected = device.require(0), torch.cuda.get_device_properties(0)
    assert found.name == expected.name
    assert found.compute_capability == (expected.major, expected.minor)
    assert found.multiprocessors == expected.multi_processor_count
    assert found.l2_bytes == expected.L2_cache_size
    assert found.shared_bytes_per_block == expected.shared_memory_per_block_optin
    assert device.count() == torch.cuda.device_count()
    assert device.status().problem is None


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(GpuNotFoundError, match="cuda:99"):
        for_device(99)


def test_memory_and_stream_of_torch(launcher: CudaLauncher, words: torch.Tensor) -> None:
    scale(launcher, words, 3, 1)
    assert torch.equal(words.cpu(), 3 * torch.arange(COUNT, dtype=torch.int32) + 1)


def test_every_kind_of_parameter(launcher: CudaLauncher) -> None:
    out = torch.zeros(4, dtype=torch.int64, device="cuda")
    arguments = (out.data_ptr(), 2**32 - 1, -7, 2**64 - 2, 2.5)
    launcher.launch(PARAMETERS, LaunchConfig.linear(1, 32), arguments, torch.cuda.current_stream().cuda_stream)
    assert out.tolist() == [2**32 - 1, -7, -2, 2560]


def test_all_of_the_shared_memory(launcher: CudaLauncher) -> None:
    count = launcher.properties.shared_bytes_per_block // 4
    data = torch.arange(count, dtype=torch.int32, device="cuda")
    config = LaunchConfig.linear(1, 256, 4 * count)
    launcher.launch(REVERSE, config, (data.data_ptr(), count), torch.cuda.current_stream().cuda_stream)
    assert torch.equal(data.cpu(), torch.arange(count, dtype=torch.int32).flip(0))


def test_a_thread_without_a_context(launcher: CudaLauncher, words: torch.Tensor) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    failures: list[BaseException] = []

    def work() -> None:
        try:
            assert driver.get().current_context() == 0
            for _ in range(50):
                scale(fresh(launcher), words, 1, 1, stream)
            assert driver.get().current_context() == 0
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert torch.equal(words.cpu(), torch.arange(COUNT, dtype=torch.int32) + 200)


def test_streams_keep_their_order(launcher: CudaLauncher) -> None:
    streams = [torch.cuda.Stream() for _ in range(4)]
    data = [torch.full((COUNT,), i, dtype=torch.int32, device="cuda") for i in range(4)]
    torch.cuda.synchronize()
    for step in range(20):
        for stream, words in zip(streams, data, strict=True):
            with torch.cuda.stream(stream):
                scale(launcher, words, 3, step)
    torch.cuda.synchronize()
    for i, words in enumerate(data):
        expected = i
        for step in range(20):
            expected = (expected * 3 + step) % 2**32
        assert (words.cpu().to(torch.int64) % 2**32 == expected).all()


def test_graphs_replay_launches(launcher: CudaLauncher, words: torch.Tensor) -> None:
    launcher.prepare((SCALE,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scale(launcher, words, 1, 5)
        scale(launcher, words, 2)
    assert torch.equal(words.cpu(), torch.arange(COUNT, dtype=torch.int32))  # captured, not run
    for _ in range(3):
        graph.replay()
    expected = torch.arange(COUNT, dtype=torch.int32)
    for _ in range(3):
        expected = (expected + 5) * 2
    assert torch.equal(words.cpu(), expected)


def test_captures_have_numbers() -> None:
    def number() -> int:
        return driver.get().capture_id(torch.cuda.current_stream().cuda_stream)

    found = [number()]
    for _ in range(2):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            found += [number(), number()]
    assert found[0] == number() == 0
    assert found[1] == found[2] != 0
    assert found[3] == found[4] not in (0, found[1])


def test_a_kernel_may_be_loaded_while_a_graph_is_captured(launcher: CudaLauncher, words: torch.Tensor) -> None:
    late = fresh(launcher)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scale(late, words, 2, 1)
    graph.replay()
    assert torch.equal(words.cpu(), 2 * torch.arange(COUNT, dtype=torch.int32) + 1)


def test_launches_allocate_nothing(launcher: CudaLauncher, words: torch.Tensor) -> None:
    scale(launcher, words, 1)
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(1000):
        scale(launcher, words, 1)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == before


def test_what_cannot_be_launched_is_an_error_and_no_more(launcher: CudaLauncher, words: torch.Tensor) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    with pytest.raises(KernelLaunchError, match="probe_scale"):
        launcher.launch(SCALE, LaunchConfig.linear(1, 2048), (words.data_ptr(), 1, 0, 1), stream)
    with pytest.raises(KernelLaunchError, match="probe_reverse"):
        launcher.launch(REVERSE, LaunchConfig.linear(1, 32, 1 << 20), (words.data_ptr(), 1), stream)
    with pytest.raises(KernelBuildError, match="probe_missing"):
        launcher.prepare((Kernel("probe_missing", TEXT, ()),))
    scale(launcher, words, 2)
    assert torch.equal(words.cpu(), 2 * torch.arange(COUNT, dtype=torch.int32))


@pytest.mark.skipif(device.count() < 2, reason="needs two GPUs")
def test_two_devices_in_one_thread(words: torch.Tensor) -> None:
    other = torch.arange(COUNT, dtype=torch.int32, device="cuda:1")
    scale(for_device(1), other, 3)  # while cuda:0 is current
    scale(for_device(0), words, 2)
    torch.cuda.synchronize(1)
    assert torch.cuda.current_device() == 0
    assert torch.equal(other.cpu(), 3 * torch.arange(COUNT, dtype=torch.int32))
    assert torch.equal(words.cpu(), 2 * torch.arange(COUNT, dtype=torch.int32))


def test_another_process_finds_the_binary(launcher: CudaLauncher) -> None:
    launcher.prepare((SCALE,))
    target = compiler.target(launcher.properties.compute_capability)
    key = cache.digest(sources.text(TEXT), target, ())
    file = cache.path(key, TEXT, target)
    assert file is not None
    assert cache.read(file, key) is not None
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from probes import SCALE\n"
        "from bitforbit.cuda import compiler, launcher\n"
        "def never(*_, **__): raise SystemExit('compiled again')\n"
        "compiler.compile = never\n"
        "launcher.for_device(0).prepare((SCALE,))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file_of_probes())], check=True, timeout=60)


def file_of_probes() -> str:
    """The directory of ``probes``."""
    return TEXT.rpartition("/")[0]
