"""What one of several processes reads of the files, and that it is what vLLM's own layers would keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from safetensors.torch import save_file  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor import parameter  # noqa: E402
from vllm.model_executor.layers import linear, vocab_parallel_embedding  # noqa: E402
from vllm.model_executor.model_loader.reload import finalize_layerwise_processing  # noqa: E402

import bitforbit  # noqa: E402
from bitforbit.errors import ChecksumError  # noqa: E402
from bitforbit.integrations.vllm.config import BitforbitQuantizationConfig  # noqa: E402
from bitforbit.integrations.vllm.lazy import LazyTensor  # noqa: E402
from bitforbit.integrations.vllm.weights import restored  # noqa: E402
from torch_helpers import assert_same_bits, gaussian  # noqa: E402

SHAPES = {
    "q": (1024, 512), "k": (512, 512), "v": (512, 512), "o": (512, 1024), "gate": (2048, 512), "up": (2048, 512),
    "embed": (4000, 512), "bias": (1024,),
}  # fmt: skip

LAYERS: dict[str, Any] = {
    "qkv": lambda quantization: linear.QKVParallelLinear(
        512, 64, 16, 8, bias=False, quant_config=quantization, prefix="qkv"
    ),
    "gate_up": lambda quantization: linear.MergedColumnParallelLinear(
        512, [2048, 2048], bias=False, quant_config=quantization, prefix="gate_up"
    ),
    "o": lambda quantization: linear.RowParallelLinear(1024, 512, bias=False, quant_config=quantization, prefix="o"),
    "embed": lambda quantization: vocab_parallel_embedding.VocabParallelEmbedding(
        4000, 512, quant_config=quantization, prefix="embed"
    ),
}
SOURCES: dict[str, dict[str, Any]] = {
    "qkv": {"q": "q", "k": "k", "v": "v"}, "gate_up": {"gate": 0, "up": 1}, "o": {"o": None}, "embed": {"embed": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("shards")
    (root / "plain").mkdir()
    tensors = {name: gaussian(shape, seed=number) for number, (name, shape) in enumerate(SHAPES.items())}
    save_file(tensors, root / "plain" / "model.safetensors")
    bitforbit.compress(root / "plain", root / "packed")
    return tensors, root / "packed" / "model.safetensors"


@contextmanager
def process(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int) -> Iterator[None]:
    """As if this process were one of several that share each layer."""
    with monkeypatch.context() as patch, set_current_vllm_config(VllmConfig()):
        for module in (linear, parameter, vocab_parallel_embedding):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: processes)
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def load(name: str, quantization: Any, tensors: dict[str, Any]) -> Any:
    layer = LAYERS[name](quantization)
    for source, shard in SOURCES[name].items():
        layer.weight.weight_loader(layer.weight, tensors[source], *([] if shard is None else [shard]))
        if not isinstance(layer.weight, torch.nn.Parameter):
            break  # compressed: all is loaded
    if quantization is not None:
        finalize_layerwise_processing(layer, None)
    return layer.weight


def read_bytes() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("processes", [1, 2, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_parts(packed: Any, monkeypatch: pytest.MonkeyPatch, name: str, processes: int) -> None:
    plain, file = packed
    for rank in {0, processes - 1}:
        with process(monkeypatch, rank, processes):
            found = restored([str(file)], share=(rank, processes))
            assert found is not None
            weight = load(name, BitforbitQuantizationConfig(), dict(found))
            assert isinstance(weight, LazyTensor)
            assert_same_bits(weight.clone(), load(name, None, plain).data)


def test_bytes(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two processes reads half of the rows, and all of what it cuts by columns or checks."""
    _, file = packed
    sizes = {name: torch.Size(shape).numel() for name, shape in sorted(SHAPES.items()) if len(shape) == 2}
    for rank in (0, 1):
        with process(monkeypatch, rank, 2):
            found = restored([str(file)], share=(rank, 2))
            assert found is not None
            tensors = dict(found)
            before = read_bytes()
            for name in LAYERS:
                load(name, BitforbitQuantizationConfig(), tensors)
            read = read_bytes() - before
        # The vector comes first in the order of the names, and is read before.
        shares = enumerate(sizes.items(), 1)
        kept = [size if name == "o" or number % 2 == rank else size / 2 for number, (name, size) in shares]
        expected = file.stat().st_size * sum(kept) / sum(sizes.values())
        assert read == pytest.approx(expected, rel=0.02)


def test_somebody_sees_damage(packed: Any, tmp_path: Path) -> None:
    _, file = packed
    data = bytearray(file.read_bytes())
    data[-3000] ^= 1
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(data)

    def half_of_all(rank: int) -> None:
        found = restored([str(damaged)], share=(rank, 2))
        assert found is not None
        for _, tensor in found:
            tensor[: len(tensor) // 2].clone()

    seen = 0
    for rank in (0, 1):
        try:
            half_of_all(rank)
        except ChecksumError:
            seen += 1
    assert seen == 1
