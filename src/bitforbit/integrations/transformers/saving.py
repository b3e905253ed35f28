"""``model.save_pretrained`` of compressed models: the files of a native directory.

transformers offers no hook between the state dict and the file, but a shard's header describes its tensors. So the
method of the model object itself is replaced; ``push_to_hub`` and whoever else saves goes through it.
"""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.hub import create_and_tag_model_card

from bitforbit.errors import UsageError
from bitforbit.format.manifest import FileEntry
from bitforbit.integrations import first, native
from bitforbit.integrations.source import DF11_CONFIG
from bitforbit.integrations.transformers.config import BitforbitConfig
from bitforbit.integrations.transformers.counting import num_parameters
from bitforbit.integrations.transformers.originals import Originals
from bitforbit.integrations.transformers.resizing import resize_token_embeddings
from bitforbit.nn import compressed_parameters
from bitforbit.nn.state import raw_state_dicts

_METHOD = "save_pretrained"
_TIE = "tie_weights"
_RESIZE = "resize_token_embeddings"
_COUNT = "num_parameters"


def attach(model: PreTrainedModel) -> None:
    """Make a model save itself in the native format, know its ties by the names of parts, take new tokens, and count
    elements.
    """
    model.__dict__[_METHOD] = functools.partial(save_pretrained, model)
    model.__dict__[_TIE] = functools.partial(_tie_weights, model)
    model.__dict__[_RESIZE] = functools.partial(resize_token_embeddings, model)
    model.__dict__[_COUNT] = functools.partial(num_parameters, model)
    first.attach(model)


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`."""
    model.__dict__.pop(_METHOD, None)
    model.__dict__.pop(_TIE, None)
    model.__dict__.pop(_RESIZE, None)
    model.__dict__.pop(_COUNT, None)
    first.detach(model)


def _tie_weights(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """As the class's, under the names that parts have now: these change as a model moves to a GPU and back."""
    model.hf_quantizer.ties.rewrite(model)
    return type(model).tie_weights(model, *args, **kwargs)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    **kwargs: Any,
) -> None:
    """Write the compressed model with its config, as transformers' method of that name does for plain ones.

    Of a model that is split over processes all of them must call this; the first one writes the whole model.

    Shards are cut so that the plain files have at most ``max_shard_size``. ``state_dict`` is ignored: the model's own
    is written. Files appear under their names when they are whole and on disk; other files of the directory stay.

    Raises UsageError where there is a file in the place of the directory, OSError for a full disk, and in the other
    processes WorkerError if the first one failed.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        with raw_state_dicts(model):  # of which the adapter alone is written
            type(model).save_pretrained(
                model, save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, variant, token,
                save_peft_format, save_original_format, **kwargs,
            )  # fmt: skip
        return
    if kwargs.pop("distributed_checkpoint", False):
        raise UsageError("a compressed model is written as one checkpoint; leave distributed_checkpoint out")

    def write() -> None:
        directory = native.directory_for(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        repo = _Repository(model, directory, token, kwargs) if push_to_hub else None
        _save(model, directory, max_shard_size, variant, save_original_format)
        if repo is not None:
            repo.upload()

    sharding = model.hf_quantizer.sharding
    if sharding is not None:
        from bitforbit.integrations.transformers.parallel_saving import save_together

        save_together(sharding, model, write)
    elif is_main_process:
        write()


def _save(
    model: PreTrainedModel, directory: Path, max_shard_size: int | str, variant: str | None, as_in_checkpoint: bool
) -> None:
    model.hf_quantizer.ties.rewrite(model)
    names = native.WeightNames(variant)
    config = model.config.quantization_config
    assert isinstance(config, BitforbitConfig)

    def write(staging: Path) -> list[FileEntry]:
        _save_config(model, staging)
        others = native.write_others(staging)
        return others + native.write_weights(
            _originals(model, as_in_checkpoint), staging, names, max_shard_size, config.threads
        )

    native.save(directory, names, write)


def _originals(model: PreTrainedModel, as_in_checkpoint: bool) -> Originals:
    sharding = model.hf_quantizer.sharding
    if sharding is None:
        return Originals(model, as_in_checkpoint)
    from bitforbit.integrations.transformers.parallel_saving import GatheredOriginals

    return GatheredOriginals(model, as_in_checkpoint, sharding)


def _save_config(model: PreTrainedModel, staging: Path) -> None:
    """What transformers writes besides weights, for the plain model."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_is_quantized", DF11_CONFIG):
        config.__dict__.pop(name, None)
    config.dtype = str(config.dtype or _main_dtype(model)).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, staging, config=config)
    config.save_pretrained(staging)
    if model.can_generate():
        model.generation_config.save_pretrained(staging)


def _main_dtype(model: PreTrainedModel) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for module in model.modules():
        for spec in compressed_parameters(module).values():
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else model.dtype


class _Repository:
    """What ``push_to_hub=True`` does before and after."""

    def __init__(self, model: PreTrainedModel, directory: Path, token: str | bool | None, options: Any) -> None:
        self._model = model
        self._directory = directory
        self._token = token
        self._message = options.pop("commit_message", None)
        self._create_pr = options.pop("create_pr", False)
        name = options.pop("repo_id", directory.name)
        if token is not None:
            options["token"] = token
        self._repo_id = HfApi().create_repo(name, exist_ok=True, **options).repo_id
        self._stamps = model._get_files_timestamps(directory)

    def upload(self) -> None:
        """Send the files that have changed, and a model card."""
        card = create_and_tag_model_card(self._repo_id, self._model.model_tags, token=self._token)
        card.save(self._directory / "README.md")
        self._model._upload_modified_files(
            self._directory,
            self._repo_id,
            self._stamps,
            commit_message=self._message,
            token=self._token,
            create_pr=self._create_pr,
        )
