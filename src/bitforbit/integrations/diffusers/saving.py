"""``model.save_pretrained`` of compressed models: the files of a native directory.

diffusers offers no hook between the state dict and the file, but a shard's header describes its tensors. So the method
of the model object itself is replaced; pipelines go through it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import HfApi

from bitforbit.errors import UsageError
from bitforbit.format.manifest import FileEntry
from bitforbit.integrations import first, native
from bitforbit.integrations.diffusers import lookup
from bitforbit.integrations.diffusers.originals import Originals

_METHOD = "save_pretrained"
_TO = "to"
_QUANTIZATION = "quantization_config"
_KIND = SAFETENSORS_WEIGHTS_NAME.partition(".")[0]
_CONFIG = "config.json"


def attach(model: ModelMixin) -> None:
    """Make a model save itself in the native format, and say what casting it takes."""
    model.__dict__[_METHOD] = functools.partial(save_pretrained, model)
    # accelerate puts a method of its own there for models on several devices.
    model.__dict__.setdefault(_TO, functools.partial(_to, model))
    first.attach(model)
    lookup.attach(model)


def detach(model: ModelMixin) -> None:
    """Make a model in which nothing is compressed any more save itself as an ordinary one."""
    model.__dict__.pop(_METHOD, None)
    if isinstance(model.__dict__.get(_TO), functools.partial):
        del model.__dict__[_TO]
    first.detach(model)
    lookup.detach(model)
    set_config(model, {key: value for key, value in model.config.items() if key != _QUANTIZATION})


def set_config(model: ModelMixin, members: dict[str, Any]) -> None:
    """Replace all of a model's config, which is frozen otherwise."""
    model._internal_dict = FrozenDict(members)


def _to(model: ModelMixin, *args: Any, **kwargs: Any) -> ModelMixin:
    """As the class's, which refuses any dtype, None and the model's own among them. Raises UsageError for others."""
    dtypes = [value for value in (*args, kwargs.pop("dtype", None)) if isinstance(value, torch.dtype)]
    for dtype in dtypes:
        if dtype != model.dtype:
            raise UsageError(
                f"expected {type(model).__name__} to stay {model.dtype}, since it is compressed, got a cast to "
                f"{dtype}; pass dtype={dtype} to from_pretrained, or cast it after model.dequantize()"
            )
    moved: ModelMixin = type(model).to(
        model, *(value for value in args if value is not None and not isinstance(value, torch.dtype)), **kwargs
    )
    return moved


def save_pretrained(
    model: ModelMixin,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    use_flashpack: bool = False,
    **kwargs: Any,
) -> None:
    """Write the compressed model with its config, as diffusers' method of that name does for plain ones.

    Shards are cut so that the plain files have at most ``max_shard_size``. Files appear under their names when they
    are whole and on disk; other files of the directory stay.

    Raises UsageError where there is a file in the place of the directory, and for other formats than safetensors,
    OSError for a full disk.
    """
    if not safe_serialization or use_flashpack or save_function is not None:
        raise UsageError(
            "a compressed model is saved to .safetensors files only; leave safe_serialization, use_flashpack and "
            "save_function out, or decompress it first (model.dequantize())"
        )
    directory = native.directory_for(save_directory)
    if not is_main_process:
        return
    directory.mkdir(parents=True, exist_ok=True)
    names = native.WeightNames(variant, _KIND)
    threads = model.hf_quantizer.quantization_config.threads

    def write(staging: Path) -> list[FileEntry]:
        model.save_config(staging)
        _make_plain(staging / _CONFIG)
        others = native.write_others(staging)
        return others + native.write_weights(Originals(model), staging, names, max_shard_size, threads, counted=False)

    native.save(directory, names, write)
    if push_to_hub:
        _push(model, directory, kwargs)


def _make_plain(path: Path) -> None:
    """Make a config the plain model's, in the form in which diffusers writes it."""
    config = json.loads(path.read_text("utf-8"))
    config.pop(_QUANTIZATION, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _push(model: ModelMixin, directory: Path, options: dict[str, Any]) -> None:
    """What ``push_to_hub=True`` does for plain models."""
    token = options.pop("token", None)
    name = options.pop("repo_id", directory.name)
    repo_id = HfApi().create_repo(name, exist_ok=True, private=options.pop("private", None), token=token).repo_id
    card = populate_model_card(load_or_create_model_card(repo_id, token=token))
    card.save(directory / "README.md")
    model._upload_folder(
        directory,
        repo_id,
        token=token,
        commit_message=options.pop("commit_message", None),
        create_pr=options.pop("create_pr", False),
    )
