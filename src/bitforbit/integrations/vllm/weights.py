"""The tensors of a compressed directory for vLLM's loader: by their original names, decoded one at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from bitforbit.cpu import default_threads
from bitforbit.format.header import read_header
from bitforbit.format.spec import QUANT_METHOD
from bitforbit.integrations.source import native_source

Weights = Iterator[tuple[str, torch.Tensor]]

_MARK = "_reads_bitforbit"


def install() -> None:
    """Wrap the method of vLLM's loader that reads files; it offers no other place. Models of others are not touched."""
    stock = DefaultModelLoader._get_weights_iterator
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def read(self: Any, source: Any) -> Weights:
        config = get_current_vllm_config_or_none()
        if config is not None and config.quant_config is not None and config.quant_config.get_name() == QUANT_METHOD:
            _folder, files, _safe, _index = self._prepare_weights(
                source.model_or_path,
                source.subfolder,
                source.revision,
                source.fall_back_to_pt,
                source.allow_patterns_overrides,
            )
            found = restored(files, getattr(self, "local_expert_ids", None))
            if found is not None:
                return ((source.prefix + name, tensor) for name, tensor in found)
        weights: Weights = stock(self, source)
        return weights

    setattr(read, _MARK, True)
    DefaultModelLoader._get_weights_iterator = read


def restored(files: Sequence[str], experts: set[int] | None = None) -> Weights | None:
    """Every tensor of these files by its original name; None if none of them was compressed by bitforbit.

    ``experts``: numbers of the experts that this process has; those of others are not read. Raises FormatError and its
    kinds for damaged or incomplete files.
    """
    source = native_source(files, default_threads())
    if source is None:
        return None

    def tensors() -> Weights:
        place = {entry.name: file for file in files for entry in read_header(Path(file)).tensors}
        for name, stored in source.tensors.items():
            if should_skip_weight(name, experts):
                continue
            if stored.unit is not None:
                yield name, source.restore(stored.unit)[name]
            else:
                with safe_open(place[name], framework="pt") as file:
                    yield name, file.get_tensor(name)

    return tensors()
