"""What can be split over how many processes is said before anything is read; parts are read as they are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers.distributed.configuration_utils import DistributedConfig

from bitforbit import errors
from bitforbit.integrations.source import native_source
from bitforbit.integrations.transformers import parallel_plan
from bitforbit.integrations.transformers.parallel import StoredPart
from integrations.conftest import Directories
from integrations.tensor_parallel_models import MODELS, OLD


def planned(name: str, **settings: Any) -> Any:
    """A model without data that is to be split."""
    with torch.device("meta"):
        model = MODELS[name]()
    model.config.distributed_config = DistributedConfig(**{"tp_plan": "auto", **settings})
    return model


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("llama", 3, ("num_attention_heads, which is 4", "got 3", "these numbers: 2")),
        ("llama", 4, ("num_key_value_heads, which is 2", "got 4", "these numbers: 2")),
        ("llama-one-head", 2, ("num_key_value_heads, which is 1", "these numbers: none")),
        ("phi3", 5, ("5",) if OLD else ()),
        ("mixtral", 4, ("num_key_value_heads",)),
        (
            "deepseek",
            5,
            ("got 5",) if OLD else ("half of dimension 1 of model.layers.1.mlp.experts.gate_up_proj", "96", ": 2, 3"),
        ),
    ],
)
def test_numbers_of_processes(name: str, size: int, words: tuple[str, ...]) -> None:
    model = planned(name, tp_size=size)
    assert parallel_plan.degree(model) == size
    if not words:
        parallel_plan.check(model, size)
        return
    with pytest.raises(errors.UsageError) as caught:
        parallel_plan.check(model, size)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma3", "qwen3-moe", "phi3", "deepseek"])
def test_two_processes_are_fine(name: str) -> None:
    parallel_plan.check(planned(name, tp_size=2), 2)


def test_a_single_process_is_an_ordinary_one() -> None:
    assert parallel_plan.degree(planned("llama", tp_size=1)) == 1
    assert parallel_plan.degree(MODELS["llama"]()) == 1


@pytest.mark.parametrize("setting", ["fsdp_size", "pp_size"])
def test_other_ways_of_splitting_are_refused(setting: str) -> None:
    model = planned("llama", tp_size=1, **{setting: 2})
    with pytest.raises(errors.UsageError, match=f"{setting}=2.*vLLM"):
        parallel_plan.degree(model)


@pytest.mark.skipif(OLD, reason="experts by process are set otherwise in older releases")
def test_experts_that_cannot_be_dealt_out() -> None:
    model = planned("qwen3-moe", tp_size=1, tp_plan=None, ep_size=1)
    model.config.distributed_config.ep_size = 3
    with pytest.raises(errors.UsageError, match=r"number of experts in .*gate_up_proj, which is 4, got 3"):
        parallel_plan.check(model, 3)


def test_a_style_that_is_unknown() -> None:
    plan = {"model.layers.*.mlp.down_proj": "diagonal"}
    with pytest.raises(errors.UsageError, match=r"model.layers.0.mlp.down_proj.weight.*'diagonal'.*vLLM"):
        parallel_plan.check(planned("llama", tp_size=2, tp_plan=plan), 2)


@pytest.mark.parametrize(
    "index",
    [
        ...,
        (slice(3, 17),),
        (slice(0, 0), slice(None)),
        (slice(None), slice(5, 64)),
        (slice(1, 100), slice(64, 65)),
        (slice(190, 500), slice(0, 500)),
    ],
)
def test_parts_of_a_stored_matrix(directories: Directories, index: Any) -> None:
    source = native_source([str(directories("llama")[1] / "model.safetensors")], 1)
    assert source is not None
    name = "model.layers.0.mlp.up_proj.weight"
    model = tf.AutoModelForCausalLM.from_pretrained(directories("llama")[0])
    expected = model.get_parameter(name)[index].detach()
    part = StoredPart(source, name, check=True)
    assert part.get_shape() == [192, 128]
    assert torch.equal(part[index], expected)
    part.finish()


@pytest.mark.parametrize(
    "index",
    [
        ...,
        (slice(1, 3), slice(None), slice(None)),
        (slice(None), slice(7, 130), slice(None)),
        (slice(0, 4), slice(7, 130), slice(3, 40)),
        (slice(2, 2), slice(7, 130), slice(3, 40)),
        (slice(0, 4), slice(None), slice(64, 128)),
    ],
)
def test_parts_of_a_stored_stack(stack: tuple[Any, torch.Tensor], index: Any) -> None:
    source, whole = stack
    assert torch.equal(StoredPart(source, "experts", check=False)[index], whole[index])


@pytest.fixture
def stack(tmp_path: Any) -> tuple[Any, torch.Tensor]:
    """Source of a checkpoint of one stack of matrices, and the stack."""
    from safetensors.torch import save_file

    import bitforbit

    whole = torch.randn(4, 192, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    (tmp_path / "plain").mkdir()
    save_file({"experts": whole}, tmp_path / "plain" / "model.safetensors")
    bitforbit.compress(tmp_path / "plain", tmp_path / "native", threads=1)
    return native_source([str(tmp_path / "native" / "model.safetensors")], 1), whole


def test_a_part_that_is_not_read_is_checked(directories: Directories) -> None:
    class Counting:
        """Notes what is asked for."""

        def __init__(self, source: Any) -> None:
            self.tensors, self._source, self.checks = source.tensors, source, 0

        def restore_slice(self, *args: Any, check: bool) -> torch.Tensor:
            self.checks += check
            part: torch.Tensor = self._source.restore_slice(*args, check=check)
            return part

    source: Any = Counting(native_source([str(directories("llama")[1] / "model.safetensors")], 1))
    for read in (False, True):
        part = StoredPart(source, "lm_head.weight", check=True)
        if read:
            assert torch.equal(part[0:3], part[...][0:3])
        part.finish()
    assert source.checks == 2
