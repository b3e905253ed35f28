"""One ``from_pretrained``: from the checkpoint's files to the parameters of the model."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform

from bitforbit.archive.source import PIPELINE_NAME
from bitforbit.codecs.base import EncodedTensor
from bitforbit.codecs.planes.layout import matrix_view
from bitforbit.cpu import default_threads
from bitforbit.errors import UsageError
from bitforbit.integrations.names import split, stored_name
from bitforbit.integrations.source import (
    DF11_CONFIG,
    TORCH_DTYPES,
    Df11Source,
    NativeSource,
    Source,
    df11_source,
    native_source,
)
from bitforbit.integrations.transformers import plan, transforms
from bitforbit.integrations.transformers.config import BitforbitConfig
from bitforbit.integrations.transformers.install import Installer
from bitforbit.integrations.transformers.plan import Destination
from bitforbit.nn import Compressed, Df11Spec, PlanesSpec, compressed_parameters, layout

if TYPE_CHECKING:
    from bitforbit.integrations.transformers.parallel import Sharding


class Load:
    """What is known during one load. Made when the model exists on the meta device, before anything is read."""

    def __init__(
        self, model: PreTrainedModel, config: BitforbitConfig, dtype: torch.dtype, files: list[str] | None
    ) -> None:
        """Opens the files.

        Raises what the sources raise, and UsageError for what a compressed model cannot do.
        """
        self.model = model
        self.sharding = _sharding_of(model)
        self.installer = Installer(model, config)
        self.where = str(Path(files[0]).parent) if files else "state_dict"
        self._config = config
        self._main_dtype = dtype
        self._files = files if files is not None else []
        self._dtypes = plan.Dtypes(model, dtype)
        self._is_df11 = bool(files) and getattr(model.config, DF11_CONFIG, None) is not None
        if self._is_df11 and self.sharding is not None:
            raise UsageError(
                f"{self.where}: a DFloat11 model cannot be split over processes; decompress it (bitforbit decompress), "
                "compress the result, and load that"
            )
        self._source = None if self._is_df11 else self._open_native()
        self._found: dict[str, Destination] = {}
        self._kept: list[tuple[str, str]] = []
        self._plain_dtypes: dict[str, torch.dtype] = {}
        self._restored: set[str] = set()
        self._positions: dict[str, int] = {}
        """Number of every tensor of the checkpoint, in the order of their names."""
        if config.runtime == "df11" and not self._is_df11:
            raise UsageError(
                f"{self.where}: expected a DFloat11 checkpoint for runtime='df11', got another one; leave runtime out"
            )
        self.arrivals: dict[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Load:
        return self

    def _open_native(self) -> Source | None:
        native = native_source(self._files, self._threads)
        if native is not None:
            _check_dtype(native, self._main_dtype, Path(self.where))
        return native

    def _open_df11(self, stock: Sequence[WeightTransform]) -> Source:
        """The list of files gains those that transformers does not know of."""
        shapes = plan.ParameterShapes(self.model, stock)
        source, self._files[:] = df11_source(self._files, self._threads, shapes)
        return source

    @property
    def _threads(self) -> int:
        return self._config.threads or default_threads()

    @property
    def from_compressed(self) -> bool:
        """Whether the files hold a compressed checkpoint."""
        return self._is_df11 or self._source is not None

    def needs_compression(self, name: str) -> bool:
        """Whether a parameter is compressed as an ordinary checkpoint loads.

        The loader casts such a tensor to the model's dtype, so those of another one are left to it.
        """
        return self.installer.may_compress(name) and self._dtypes.of(name) == self._main_dtype

    # --- before the loader runs ----------------------------------------------------------------------------------

    def plan(self, stock: Sequence[WeightTransform]) -> list[WeightTransform]:
        """What the loader is to do instead of ``stock``, and the model's compressed parameters without data.

        Raises ShapeMismatchError, MissingTensorError or UsageError, and what a DFloat11 directory raises when opened.
        """
        if self.sharding is not None:
            self.sharding.prepare()
        if self._is_df11:
            self._source = self._open_df11(stock)
        source = self._source
        if source is None:
            return list(stock)
        self._found = plan.destinations(self.model, source.tensors, stock)
        self._positions = {name: i for i, name in enumerate(sorted(source.tensors))}
        plan.check_shapes(self.model, source.tensors, self._found, self.where)
        twins = {name: self.installer.ties.twins(name) for name in self.installer.ties.names}
        plan.check_complete(self.model, self._found, stock, twins, self.where)
        names: dict[str, str] = {}
        targets: list[str] = []
        for anchor, originals in source.anchors.items():
            wanted = {name: self._found[name] for name in originals if name in self._found}
            if not wanted:
                continue
            if isinstance(source, NativeSource) and self._stays(source, originals[0]):
                names |= self._keep(source, originals[0], targets)
                continue
            self._restored.update(destination.target for destination in wanted.values())
            names |= dict.fromkeys(source.consumed[anchor], transforms.SWALLOWED)
            if not any(destination.converted for destination in wanted.values()):
                arrival = next(iter(wanted.values())).target
                self.arrivals[arrival] = anchor
                names[anchor] = transforms.token(len(targets))
                targets.append(arrival)
            else:  # one tensor only: ParameterShapes refuses DFloat11 units of which transformers converts any
                names[anchor] = originals[0]
        self._note_plain_dtypes(source)
        self.model._keys_to_ignore_on_load_unexpected = {
            *(self.model._keys_to_ignore_on_load_unexpected or ()),
            transforms.SWALLOWED,
        }
        converters = [transforms.Converting(t, self) if isinstance(t, WeightConverter) else t for t in stock]
        return [transforms.Disguise(names), transforms.Restore(self), *converters, transforms.Reveal(targets)]

    def _stays(self, source: NativeSource, name: str) -> bool:
        """Whether a tensor is wanted just as it is stored."""
        destination, stored = self._found[name], source.tensors[name]
        if self.sharding is not None:
            return False
        same = TORCH_DTYPES.get(stored.dtype) == self._dtypes.of(destination.target)
        return not destination.converted and same and self.installer.may_compress(destination.target)

    def _keep(self, source: NativeSource, name: str, targets: list[str]) -> dict[str, str]:
        target = self._found[name].target
        record = source.record(name)
        encoded = EncodedTensor(record.codec, record.codec_version, record.dtype, record.shape, record.config)
        self.installer.install(target, PlanesSpec.of_encoded(encoded), record.parts)
        self._kept.append((name, target))
        names = {}
        for stored, part in zip(source.consumed[source.tensors[name].unit or ""], record.parts, strict=True):
            names[stored] = transforms.token(len(targets))
            targets.append(stored_name(target, part))
        return names

    def _note_plain_dtypes(self, source: Source) -> None:
        # transformers 5.17 does not cast plain tensors of such a checkpoint if it renames them.
        for name, destination in self._found.items():
            stored, wanted = source.tensors[name], self._dtypes.of(destination.target)
            floating = wanted.is_floating_point and not destination.converted
            if stored.unit is None and floating and TORCH_DTYPES.get(stored.dtype) != wanted:
                self._plain_dtypes[destination.target] = wanted

    # --- while the loader runs: see transforms.Work --------------------------------------------------------------

    @property
    def device(self) -> torch.device | None:
        """See :class:`transforms.Work`."""
        return None if self.sharding is None else self.sharding.device

    def part(self, anchor: str, target: str, index: int) -> torch.Tensor | None:
        """See :class:`transforms.Work`."""
        sharding, source = self.sharding, self._source
        assert sharding is not None
        assert isinstance(source, NativeSource)
        (name,) = source.anchors[anchor]
        # The checksums of files are checked once by all processes together.
        check = self._config.verify and self._positions[name] % sharding.size == sharding.rank
        return sharding.guarded(lambda: sharding.part(source, name, target, index, check))

    def is_anchor(self, key: str) -> bool:
        """See :class:`transforms.Work`."""
        return self._source is not None and key in self._source.anchors

    def decoded(self, anchor: str) -> torch.Tensor | None:
        """See :class:`transforms.Work`."""
        if self._source is None or anchor not in self._source.anchors:
            return None
        (value,) = self._source.restore(anchor).values()
        return value

    def restored(self, anchor: str) -> dict[str, torch.Tensor]:
        """See :class:`transforms.Work`."""
        assert self._source is not None
        if self.sharding is not None:
            target = self._found[self._source.anchors[anchor][0]].target
            value = self.part(anchor, target, 0)
            return {} if value is None else {target: value}
        values = self._source.restore(anchor)
        return {self._found[name].target: value for name, value in values.items() if name in self._found}

    def dtype(self, target: str) -> torch.dtype:
        """See :class:`transforms.Work`."""
        return self._dtypes.of(target)

    def finish(self, name: str, value: torch.Tensor, missing_keys: set[str] | None) -> dict[str, torch.Tensor]:
        """See :class:`transforms.Work`."""
        if value.is_floating_point() and self._dtypes.knows(name):
            value = value.to(self._dtypes.of(name))
        if not self.installer.may_compress(name):
            return {name: value}
        if self.sharding is None:
            return self.installer.compress(name, value, missing_keys)
        return self.sharding.guarded(lambda: self._finish_part(name, value, missing_keys))

    def _finish_part(self, name: str, value: torch.Tensor, missing_keys: set[str] | None) -> dict[str, torch.Tensor]:
        assert self.sharding is not None
        tied = [name, *self.installer.ties.twins(name)]
        self.sharding.localize(tied)
        loaded = self.installer.compress(name, value, missing_keys)
        self.sharding.settle(tied)
        return loaded

    def kept(self, anchor: str, device: torch.device, missing_keys: set[str] | None) -> dict[str, torch.Tensor] | None:
        """See :class:`transforms.Work`: a DFloat11 unit, if the model is to run from its layout."""
        if self._config.runtime != "df11" or not isinstance(self._source, Df11Source):
            return None
        unit = self._source.unit(anchor)
        if unit is None:
            return None
        from bitforbit.ops import gpu

        geometry, tensors = gpu.df11_prepare(unit, device)
        # Parameters, which the loader takes as they are: all matrices of the unit share them.
        parts = {part: torch.nn.Parameter(tensor, requires_grad=False) for part, tensor in tensors.items()}
        loaded: dict[str, torch.Tensor] = {}
        plain: dict[str, torch.Tensor] = {}
        begin = 0
        for name in self._source.anchors[anchor]:
            shape = self._source.tensors[name].shape
            rows, cols = matrix_view(shape)
            spec = Df11Spec(torch.bfloat16, shape, rows, cols, geometry.elements, begin)
            begin += spec.elements
            target = self._found[name].target if name in self._found else None
            if target is None:
                continue
            if self.installer.may_compress(target) and self._dtypes.of(target) == torch.bfloat16:
                loaded |= self.installer.keep(target, spec, parts, missing_keys)
                for each in (target, *self.installer.ties.twins(target)):
                    self.model.get_submodule(split(each)[0]).__dict__["_bitforbit_raw_state"] = True
            else:
                plain = plain or self._source.restore(anchor)
                loaded |= self.finish(target, plain[name].to(device), missing_keys)
        return loaded

    def will_compress(self, name: str) -> bool:
        """Whether a parameter that is plain as yet will be compressed when its values are there."""
        if not self.from_compressed:
            return self.needs_compression(name)
        return name in self._restored and self.installer.may_compress(name)

    def scratch_bytes(self) -> int:
        """Memory that exact mode takes on a GPU for weights decoded before they are multiplied: an estimate."""
        from bitforbit.ops import gpu

        sizes = []
        for prefix, module in self.model.named_modules():
            if isinstance(module, torch.nn.Embedding):
                continue  # of which rows are decoded
            sizes += [spec.nbytes for spec in compressed_parameters(module).values()]
            for name, parameter in module._parameters.items():
                if parameter is not None and self.will_compress(f"{prefix}.{name}" if prefix else name):
                    sizes.append(parameter.nbytes)
        return int(gpu.scratch_bytes(sizes))

    # --- after the loader has run --------------------------------------------------------------------------------

    def close(self) -> None:
        """Check what was loaded. Raises ChecksumError; ModelLoadError if another process failed."""
        if self.sharding is not None:
            self.sharding.finish()
        if isinstance(self._source, NativeSource) and self._config.verify:
            names, parts = [name for name, _ in self._kept], [self._parts(target) for _, target in self._kept]
            with ThreadPoolExecutor(self._config.threads or default_threads()) as pool:
                # In order: of several errors, that of the first tensor.
                deque(pool.map(self._source.check, names, parts), maxlen=0)
        for module in self.model.modules():
            module.__dict__.pop("_bitforbit_raw_state", None)
        self._settle()
        # What is kept for saving must not keep this load, and with it the files, open.
        used = self.model._weight_conversions
        self.model._weight_conversions = [t.stock if isinstance(t, transforms.Converting) else t for t in used]
        for target, wanted in self._plain_dtypes.items():
            tensor = self.model.get_parameter_or_buffer(target)
            if tensor.dtype != wanted:
                tensor.data = tensor.data.to(wanted)

    def _settle(self) -> None:
        """Convert what is on a GPU to the layout to run from, parameter by parameter."""
        for module in self.model.modules():
            if not isinstance(module, Compressed):
                continue
            if self._config.runtime == "planes":
                layout.choose(module, "planes")
            else:
                layout.settle(module)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what conversion took beside the model
        self.installer.ties.rewrite(self.model)

    def _parts(self, target: str) -> list[torch.Tensor]:
        """The parts of a compressed parameter, as they are in memory."""
        module_name, parameter_name = split(target)
        parts: tuple[torch.Tensor, ...] = self.model.get_submodule(module_name)._bitforbit_parts(parameter_name)
        return list(parts)


def _sharding_of(model: PreTrainedModel) -> Sharding | None:
    if getattr(model.config, "distributed_config", None) is None:
        return None
    from bitforbit.integrations.transformers.parallel import sharding_of  # needs a torch with torch.distributed

    return sharding_of(model)


def _check_dtype(source: NativeSource, asked: torch.dtype, directory: Path) -> None:
    """Refuse a dtype that was asked for and is neither that of the weights nor the one of config.json."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in source.tensors.values():
        if tensor.unit is not None and tensor.dtype in TORCH_DTYPES:
            dtype = TORCH_DTYPES[tensor.dtype]
            sizes[dtype] = sizes.get(dtype, 0) + torch.Size(tensor.shape).numel()
    # A pipeline of diffusers asks for one dtype for all its components, in whichever they are stored.
    if not sizes or asked in sizes or (directory.parent / PIPELINE_NAME).is_file():
        return
    stored = max(sizes, key=lambda dtype: sizes[dtype])
    path = directory / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    if str(asked).removeprefix("torch.") in (config.get("dtype"), config.get("torch_dtype")):
        return
    raise UsageError(
        f"{directory}: expected dtype 'auto' or {stored}, which the weights have, got {asked}; leave dtype out, or "
        "decompress the model (bitforbit decompress), which any dtype can be loaded from"
    )
