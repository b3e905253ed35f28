"""``bitforbit.compress_model`` and ``decompress_model``: those of ``bitforbit.nn``, made known to other libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from bitforbit.errors import UsageError
from bitforbit.nn import model as plain

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel


def compress_model(
    module: nn.Module, mode: str = "exact", skip: Iterable[str] = (), threads: int | None = None
) -> nn.Module:
    """Compress the parameters of a model in place: see :func:`bitforbit.nn.compress_model`.

    A model of transformers or diffusers then saves itself as a compressed one, as if it had been loaded with
    ``BitforbitConfig``. Raises UsageError for models that are split over processes.
    """
    _refuse_split(module)
    models = list(_transformers_models(module))
    ties = []
    if models:
        from bitforbit.integrations.transformers.adopt import adopt, ties_of

        ties = [ties_of(model) for model in models]
    plain.compress_model(module, mode, skip, threads)
    for model, tied in zip(models, ties, strict=True):
        adopt(model, tied, mode)
    for model in _diffusers_models(module):
        from bitforbit.integrations.diffusers.adopt import adopt as adopt_diffusers

        adopt_diffusers(model, mode)
    return module


def decompress_model(module: nn.Module) -> nn.Module:
    """Make every parameter plain again, in place: see :func:`bitforbit.nn.decompress_model`."""
    plain.decompress_model(module)
    for model in _transformers_models(module):
        from bitforbit.integrations.transformers.adopt import release

        release(model)
    for model in _diffusers_models(module):
        from bitforbit.integrations.diffusers.adopt import release as release_diffusers

        release_diffusers(model)
    return module


def _refuse_split(module: nn.Module) -> None:
    library = sys.modules.get("torch.distributed.tensor")
    for name, parameter in module.named_parameters() if library is not None else ():
        if isinstance(parameter, library.DTensor):  # type: ignore[union-attr]
            raise UsageError(
                f"{name}: expected a parameter that this process has alone, got a DTensor; a model that is split over "
                "processes is compressed while it loads: from_pretrained(..., quantization_config=BitforbitConfig())"
            )


def _transformers_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The models of transformers in a module; not the models within those."""
    if "transformers.modeling_utils" in sys.modules:
        from transformers import PreTrainedModel

        yield from _outermost(module, PreTrainedModel)


def _diffusers_models(module: nn.Module) -> Iterator[ModelMixin]:
    """The models of diffusers in a module; not the models within those."""
    if "diffusers.models.modeling_utils" in sys.modules:
        from diffusers import ModelMixin

        yield from _outermost(module, ModelMixin)


def _outermost(module: nn.Module, kind: type[nn.Module]) -> Iterator[Any]:
    if isinstance(module, kind):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kind)
