"""``bitforbit.compress_model`` and ``decompress_model``: those of ``bitforbit.nn``, made known to other libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import nn

from bitforbit.nn import model as plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress_model(
    module: nn.Module, mode: str = "exact", skip: Iterable[str] = (), threads: int | None = None
) -> nn.Module:
    """Compress the parameters of a model in place: see :func:`bitforbit.nn.compress_model`.

    A model of transformers then saves itself as a compressed one, as if it had been loaded with ``BitforbitConfig``.
    """
    models = list(_transformers_models(module))
    if not models:
        return plain.compress_model(module, mode, skip, threads)
    from bitforbit.integrations.transformers.adopt import adopt, ties_of

    ties = [ties_of(model) for model in models]
    plain.compress_model(module, mode, skip, threads)
    for model, tied in zip(models, ties, strict=True):
        adopt(model, tied, mode)
    return module


def decompress_model(module: nn.Module) -> nn.Module:
    """Make every parameter plain again, in place: see :func:`bitforbit.nn.decompress_model`."""
    plain.decompress_model(module)
    for model in _transformers_models(module):
        from bitforbit.integrations.transformers.adopt import release

        release(model)
    return module


def _transformers_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The models of transformers in a module; not the models within those."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _transformers_models(child)
