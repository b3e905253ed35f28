"""The tensors of a compressed directory for vLLM's loader: by their original names, decoded as far as they are used."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from bitforbit.cpu import default_threads
from bitforbit.format.spec import QUANT_METHOD
from bitforbit.integrations.source import TORCH_DTYPES, NativeSource, StoredTensor, native_source
from bitforbit.integrations.vllm import embedding
from bitforbit.integrations.vllm.lazy import LazyTensor, Range, Whole

Weights = Iterator[tuple[str, torch.Tensor]]

_MARK = "_reads_bitforbit"


def install() -> None:
    """Wrap two methods of vLLM's loader: it offers no other place. Models of others are not touched."""
    if hasattr(DefaultModelLoader, _MARK):
        return
    setattr(DefaultModelLoader, _MARK, True)
    stock_read, stock_load = DefaultModelLoader._get_weights_iterator, DefaultModelLoader.load_weights

    @functools.wraps(stock_read)
    def read(self: Any, source: Any) -> Weights:
        if _quantization() is not None:
            _folder, files, _safe, _index = self._prepare_weights(
                source.model_or_path,
                source.subfolder,
                source.revision,
                source.fall_back_to_pt,
                source.allow_patterns_overrides,
            )
            share = (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
            found = restored(files, getattr(self, "local_expert_ids", None), share)
            if found is not None:
                return ((source.prefix + name, tensor) for name, tensor in found)
        weights: Weights = stock_read(self, source)
        return weights

    @functools.wraps(stock_load)
    def load(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        quantization = _quantization()
        if quantization is not None:
            untied = quantization.untied or model_config.word_embeddings_untied_by_checkpoint
            embedding.adopt(model, quantization, untied)
        stock_load(self, model, model_config)

    DefaultModelLoader._get_weights_iterator = read
    DefaultModelLoader.load_weights = load


def _quantization() -> Any:
    """Our configuration for the model that is being loaded; None if it is loaded with another, or none."""
    config = get_current_vllm_config_or_none()
    found = None if config is None else config.quant_config
    return found if found is not None and found.get_name() == QUANT_METHOD else None


def restored(files: Sequence[str], experts: set[int] | None = None, share: tuple[int, int] = (0, 1)) -> Weights | None:
    """Every tensor of these files by its original name; None if none of them was compressed by bitforbit.

    Matrices are lazy: what is read of them is what vLLM's loaders cut out. ``experts``: numbers of the experts that
    this process has; those of others are left out. ``share``: number of this process and how many read these files
    together, each a part of every tensor; each of them checks its share of the checksums, and those of all tensors of
    which it reads all bytes. Raises FormatError and its kinds for damaged or incomplete files.
    """
    source = native_source(files, default_threads())
    if source is None:
        return None
    rank, processes = share
    checked = {name for number, name in enumerate(sorted(source.tensors)) if number % processes == rank}

    def tensors() -> Weights:
        for name, stored in source.tensors.items():
            if should_skip_weight(name, experts):
                continue
            if len(stored.shape) < 2 or stored.dtype not in TORCH_DTYPES:
                yield name, source.restore_slice(name, check=True)
            else:
                yield name, LazyTensor.of(StoredWeight(source, stored, name in checked))

    return tensors()


class StoredWeight(Whole):
    """A tensor of the files. ``check``: compare the checksum even if a part is asked for, which reads all of it."""

    def __init__(self, source: NativeSource, stored: StoredTensor, check: bool) -> None:
        self.shape, self.dtype = stored.shape, TORCH_DTYPES[stored.dtype]
        self._source = source
        self._stored = stored
        self._check = check

    def read(self, rows: Range, columns: Range) -> torch.Tensor:
        """See :class:`Whole`. Raises ChecksumError, CorruptTensorError, TruncatedFileError."""
        name, unit = self._stored.name, self._stored.unit
        all_rows, all_columns = rows == (0, self.shape[0]), columns == (0, self.shape[-1])
        if all_rows and all_columns and unit is not None:
            return self._source.restore(unit)[name]
        check, self._check = self._check or all_rows, False
        return self._source.restore_slice(
            name, None if all_rows else rows, None if all_columns else columns, check=check
        )
