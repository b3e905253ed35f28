"""One ``from_pretrained``: from the checkpoint's files to the parameters of the model.

diffusers reads a file into a dictionary, then puts its tensors into the model one by one. A compressed tensor that is
wanted as it is stored arrives as its parts, mapped from the file. One that is wanted in another dtype, or not to be
compressed, is decoded when its turn comes, goes through the loader as a plain tensor, and is compressed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from torch import nn

from bitforbit.codecs.base import EncodedTensor
from bitforbit.cpu import default_threads
from bitforbit.errors import MissingTensorError, ShapeMismatchError, UsageError
from bitforbit.integrations import first
from bitforbit.integrations.names import may_compress, split, stored_name
from bitforbit.integrations.options import Options
from bitforbit.integrations.source import TORCH_DTYPES, NativeSource, native_source
from bitforbit.nn import Compressed, PlanesSpec, compressed_parameters, install_parameter, layout
from bitforbit.nn.parameters import planes, remove_parameter

_PART = "sign_mantissa__"
_DF11_MARK = ".encoded_exponent"
"""Suffix of a tensor that every DFloat11 unit has."""


class Load:
    """What is known during one load."""

    def __init__(
        self, options: Options, dtype: torch.dtype | None, files: Sequence[Any], loaded_keys: list[str]
    ) -> None:
        """Opens the files. ``loaded_keys`` are the loader's, which :meth:`plan` changes. Raises what sources raise."""
        self._options = options
        self._asked = dtype
        self._keys = loaded_keys
        paths = [str(file) for file in files]
        self._is_single = len(paths) == 1
        self.where = str(Path(paths[0]).parent) if paths else "state_dict"
        self._source: NativeSource | None = native_source(paths, options.threads)
        self._model: Any = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._kept: dict[str, str] = {}
        """Stored tensor -> parameter, for those that are wanted as they are stored."""
        self._arrivals: dict[str, str | None] = {}
        """Stored name of a part -> what becomes of it: a part's name in the model, or nothing."""
        self._restored: dict[str, str] = {}
        """Anchor of a tensor that is decoded -> parameter."""

    @property
    def from_compressed(self) -> bool:
        """Whether the files hold a compressed checkpoint."""
        return self._source is not None

    # --- before the loader runs ----------------------------------------------------------------------------------

    def plan(self, model: ModelMixin, keep_in_fp32: Sequence[str]) -> None:
        """Decide what becomes of every stored tensor, and give the model its compressed parameters, without data.

        Raises ShapeMismatchError, MissingTensorError.
        """
        self._model = model
        places = model.state_dict()
        self._dtypes = {name: self._wanted(name, place.dtype, keep_in_fp32) for name, place in places.items()}
        source = self._source
        if source is None:
            self._refuse_df11()
            return
        targets = self._targets(source)
        for name, target in targets.items():
            if target in places and source.tensors[name].shape != tuple(places[target].shape):
                raise ShapeMismatchError(
                    f"{self.where}, tensor {name!r}: expected shape {list(places[target].shape)} for {target}, as "
                    f"config.json says, got {list(source.tensors[name].shape)}; weights and config are of different "
                    "models"
                )
        missing = {name for name, _ in model.named_parameters()} - set(targets.values())
        if missing:
            raise MissingTensorError(
                f"{self.where}: expected a tensor for {min(missing)}, got none; files are missing, or config.json is "
                "of another model"
            )
        for anchor, (name,) in source.anchors.items():
            self._plan_one(source, anchor, name, targets[name])
        keys = [key for key in self._keys if key not in self._arrivals]
        keys += [new for new in self._arrivals.values() if new is not None]
        self._keys[:] = [*keys, *self._restored.values()]

    def _refuse_df11(self) -> None:
        if any(key.endswith(_DF11_MARK) for key in self._keys):
            raise UsageError(
                f"{self.where}: a DFloat11 checkpoint, which diffusers cannot load; decompress it (bitforbit "
                "decompress) and load the result"
            )

    def _wanted(self, name: str, own: torch.dtype, keep_in_fp32: Sequence[str]) -> torch.dtype:
        """The dtype that the stock loader gives to a parameter or buffer."""
        if self._asked is None or not own.is_floating_point:
            return own
        return torch.float32 if any(part in name.split(".") for part in keep_in_fp32) else self._asked

    def _targets(self, source: NativeSource) -> dict[str, str]:
        """Parameter of every stored tensor: diffusers renames those of old checkpoints, in single files."""
        names = {name: name for name in source.tensors}
        if self._is_single:
            self._model._fix_state_dict_keys_on_load(names)
        return {name: target for target, name in names.items()}

    def _plan_one(self, source: NativeSource, anchor: str, name: str, target: str) -> None:
        self._arrivals.update(dict.fromkeys(source.consumed[anchor]))
        same = TORCH_DTYPES.get(source.tensors[name].dtype) == self._dtypes.get(target)
        if not same or not may_compress(self._model, target, self._options):
            self._restored[anchor] = target
            return
        record = source.record(name)
        spec = PlanesSpec.of_encoded(
            EncodedTensor(record.codec, record.codec_version, record.dtype, record.shape, record.config)
        )
        module, parameter = self._parameter(target)
        parts = {part: torch.empty(size, dtype=torch.uint8, device="meta") for part, size in record.parts.items()}
        install_parameter(module, parameter, spec, parts, mode=self._options.mode)
        self._kept[name] = target
        stored = zip(source.consumed[anchor], record.parts, strict=True)
        self._arrivals.update((each, stored_name(target, part)) for each, part in stored)

    def _parameter(self, name: str) -> tuple[nn.Module, str]:
        module, parameter = split(name)
        return self._model.get_submodule(module), parameter

    # --- while the loader runs -----------------------------------------------------------------------------------

    def arriving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a file by name of the parameter. Raises UsageError for a compressed single file."""
        if self._source is None and any(split(key)[1].startswith(_PART) for key in state_dict):
            raise UsageError(
                "expected an ordinary file for from_single_file, got one that was compressed by bitforbit; decompress "
                "it (bitforbit decompress), or save the model with save_pretrained and compress that directory"
            )
        tensors: dict[str, Any] = {}
        for key, value in state_dict.items():
            if key in self._restored:
                tensors[self._restored[key]] = key
            elif key not in self._arrivals:
                # diffusers casts all plain tensors but those in FP8, which it takes for another method's.
                wanted = self._dtypes.get(key)
                cast = wanted is not None and value.is_floating_point() and value.dtype.itemsize == 1
                tensors[key] = value.to(wanted) if cast else value
            elif (name := self._arrivals[key]) is not None:
                tensors[name] = value
        return tensors if self._source is None else _Arriving(tensors, self)

    def restore(self, anchor: str) -> torch.Tensor:
        """The tensor of a unit, in the dtype that is wanted."""
        assert self._source is not None
        (value,) = self._source.restore(anchor).values()
        return value.to(self._dtypes.get(self._restored[anchor], value.dtype))

    def needs_compression(self, name: str) -> bool:
        """Whether a tensor that arrives under the name of a parameter is to be compressed."""
        if self.from_compressed and name not in self._restored.values():
            return False
        return may_compress(self._model, name, self._options)

    def compress(self, name: str, value: torch.Tensor, device: Any) -> None:
        """Make a tensor the parameter of that name: compressed, or plain where that does not pay."""
        module, parameter = self._parameter(name)
        value = value.to(device)
        made = planes(value, self._options.threads)
        if made is not None:
            install_parameter(module, parameter, *made, mode=self._options.mode)
        elif isinstance(module, Compressed) and parameter in compressed_parameters(module):
            remove_parameter(module, parameter, nn.Parameter(value, requires_grad=False))
        else:
            set_module_tensor_to_device(module, parameter, device, value=value, dtype=value.dtype)

    # --- after the loader has run --------------------------------------------------------------------------------

    def close(self) -> None:
        """Check what was loaded, and convert what is on a GPU to the layout to run from. Raises ChecksumError."""
        if self._source is not None and self._options.verify:
            parts = [self._parts(target) for target in self._kept.values()]
            with ThreadPoolExecutor(self._options.threads or default_threads()) as pool:
                # In order: of several errors, that of the first tensor.
                deque(pool.map(self._source.check, self._kept, parts), maxlen=0)
        for module in self._model.modules():
            if isinstance(module, Compressed):
                if self._options.runtime == "planes":
                    layout.choose(module, "planes")
                else:
                    layout.settle(module)
        first.floats_first(self._model)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what conversion took beside the model

    def _parts(self, target: str) -> list[torch.Tensor]:
        module, parameter = self._parameter(target)
        assert isinstance(module, Compressed)
        return list(module._bitforbit_parts(parameter))


class _Arriving(dict[str, Any]):
    """Tensors by name, some of them decoded only when they are looked at."""

    def __init__(self, tensors: Mapping[str, Any], load: Load) -> None:
        """``tensors`` holds the anchors of those in the place of their values."""
        super().__init__(tensors)
        self._load = load

    def __getitem__(self, name: str) -> torch.Tensor:
        value = super().__getitem__(name)
        return self._load.restore(value) if isinstance(value, str) else value

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:  # type: ignore[override]
        return ((name, self[name]) for name in list(self))
