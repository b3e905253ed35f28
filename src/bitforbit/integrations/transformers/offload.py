"""Blocks of a model that a device map has put beside the device that computes: streamed, in the place of accelerate's
hooks, which fetch tensor by tensor when it is needed.

A block is a decoder layer (``_no_split_modules``) or a leaf such as the head, all of whose parameters are offloaded.
Embeddings, tied weights, and what else is offloaded stay with accelerate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from bitforbit.errors import UsageError
from bitforbit.format.header import Header, read_header
from bitforbit.integrations.source import TORCH_DTYPES
from bitforbit.nn import compressed_parameters
from bitforbit.offload import AHEAD, FileRange, Stream, slot_sizes, stream_blocks

_ATTRIBUTE = "_bitforbit_streams"


def stream(model: PreTrainedModel, ahead: int = AHEAD) -> list[Stream]:
    """Stream what accelerate would fetch, block by block. Returns the streams, one per device that computes."""
    tied = _tied(model)
    blocks: dict[torch.device, dict[str, nn.Module]] = {}
    stored: dict[torch.device, dict[str, FileRange]] = {}
    files = _Files()
    for name, module in _candidates(model):
        hooks = [hook for each in module.modules() if (hook := _offloading_hook(each)) is not None]
        devices = {torch.device(_device(hook.execution_device)) for hook in hooks}
        names = {f"{name}.{own}": own for own, _ in module.named_parameters()}
        if len(devices) != 1 or tied & names.keys():
            continue
        ranges = _ranges(name, module, hooks, files)
        if ranges is not None:
            (device,) = devices
            blocks.setdefault(device, {})[name] = module
            stored.setdefault(device, {}).update(ranges)
    streams = [_start(model, blocks[device], device, ahead, stored[device]) for device in blocks]
    model.__dict__[_ATTRIBUTE] = streams
    if any(each.device.type == "cpu" and each.file_bytes for each in streams):
        _keep_in_memory(model)
    return streams


def streams_of(model: nn.Module) -> list[Stream]:
    """The streams of a model's blocks."""
    return list(model.__dict__.get(_ATTRIBUTE, ()))


@contextmanager
def brought_back(model: nn.Module) -> Iterator[None]:
    """Stop the streaming of all blocks, for good: their parameters are in the memory of the device that computes.

    Within the context, compressed modules have none of accelerate's hooks, which hold on to the ``forward`` of a class.
    Raises UsageError where accelerate has more of a model that is compressed than blocks; BlockReadError.
    """
    hooked = [each for each in model.modules() if compressed_parameters(each) and hasattr(each, "_hf_hook")]
    for name, module in model.named_modules():
        if module in hooked and _offloading_hook(module) is not None:
            raise UsageError(
                f"expected a model in memory, got {name} offloaded by accelerate; load it without a device_map"
            )
    for each in model.__dict__.pop(_ATTRIBUTE, ()):
        for name in each.names:
            each.remove(name, load=True)
            module = model.get_submodule(name)
            remove_hook_from_module(module)
            each.remove(name)
            module.to(each.device)
    hooks = [(module, module._hf_hook) for module in hooked if hasattr(module, "_hf_hook")]
    for module, _ in hooks:
        _unhook(module)
    yield
    for module, hook in hooks:
        add_hook_to_module(module, hook)


class BlockHook(ModelHook):
    """At a streamed block's border: brings its inputs to the device; knows where its parameters are, for saving."""

    def __init__(self, stream: Stream, name: str, hook: AlignDevicesHook) -> None:
        self.weights_map: Mapping[str, torch.Tensor] = stream.tensors(name)
        self._stream = stream
        self._name = name
        self._skip_keys = hook.skip_keys

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See ModelHook."""
        device = self._stream.device
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=self._skip_keys)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """See ModelHook: whoever takes the hooks away, such as PEFT, gets the block as accelerate had found it."""
        self._stream.remove(self._name)
        return module


def _keep_in_memory(model: nn.Module) -> None:
    """Copy what stays in CPU memory: it is mapped from files, and would be read again whenever memory is short."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_cpu and id(tensor) not in seen:
            seen.add(id(tensor))
            tensor.data = tensor.data.clone()


def _start(
    model: PreTrainedModel,
    blocks: dict[str, nn.Module],
    device: torch.device,
    ahead: int,
    stored: Mapping[str, FileRange],
) -> Stream:
    borders: dict[str, AlignDevicesHook] = {}
    for name, module in blocks.items():
        for each in module.modules():
            hook = _offloading_hook(each)
            _unhook(each)  # which brings back what is in host memory
            if hook is not None:
                borders.setdefault(name, hook)
                for own in each._parameters:
                    hook.weights_map.dataset.state_dict.pop(f"{hook.weights_map.prefix}{own}", None)
        module.requires_grad_(False)
    started = stream_blocks(blocks, device, ahead=ahead, stored=stored)
    for name, module in blocks.items():
        add_hook_to_module(module, BlockHook(started, name, borders[name]))
        # Where it computes: whoever loads adapters by the map must not leave theirs elsewhere, nor move the model.
        model.hf_device_map[name] = "cpu" if device.type == "cpu" else started.device.index
    return started


def _candidates(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Blocks all of whose parameters are offloaded, in the order of the model."""

    def is_candidate(module: nn.Module) -> bool:
        holders = [each for each in module.modules() if any(own is not None for own in each._parameters.values())]
        away = all(parameter.is_meta for parameter in module.parameters())
        return away and all(_offloading_hook(each) is not None for each in holders)

    return _blocks(model, is_candidate)


def _blocks(model: PreTrainedModel, is_candidate: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Candidates that can be blocks: layers, and leaves with matrices that are no embeddings.

    Where a model does not say what its layers are, they are the members of its lists of modules.
    """
    classes = set(getattr(model, "_no_split_modules", None) or ())

    def visit(name: str, module: nn.Module, is_listed: bool = False) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, nn.Embedding):
            return
        own_class = getattr(module, "_bitforbit_base", type(module)).__name__
        is_layer, is_leaf = own_class in classes or (is_listed and not classes), not [*module.children()]
        if name and (is_layer or is_leaf) and is_candidate(module):
            if any(p.dim() > 1 or p.dtype == torch.uint8 for p in module.parameters()):
                yield name, module
            return
        for own, child in module.named_children():
            yield from visit(f"{name}.{own}" if name else own, child, isinstance(module, nn.ModuleList))

    return visit("", model)


def leave_room(
    model: PreTrainedModel, max_memory: Mapping[int | str, float], sizes: Mapping[str, float], ahead: int
) -> tuple[dict[int | str, float], int]:
    """Limits that leave memory for the slots of streamed blocks, and how many blocks ahead that memory is for.

    ``sizes`` are the bytes of the model's parameters and buffers by name. transformers itself leaves room for one
    layer on the device that computes what is offloaded: the first GPU, or the CPU where there is none. With slots that
    would take more than half of that device, fewer blocks are fetched ahead.
    """
    gpus = [place for place in max_memory if isinstance(place, int)]
    computing: list[int | str] = [*gpus] if gpus else ["cpu"]
    main = next((place for place in computing if max_memory.get(place, 0) > 0), None)
    blocks = [
        math.ceil(sum(sizes.get(f"{name}.{own}", 0) for own, _ in module.named_parameters()))
        for name, module in _blocks(model, lambda _: True)
    ]
    if main is None or not blocks:
        return dict(max_memory), ahead
    one = max(blocks)
    twins = getattr(model, "all_tied_weights_keys", None) or {}
    whole = sum(nbytes for name, nbytes in sizes.items() if name not in twins)  # tied weights once
    if whole + one <= sum(max_memory[place] for place in computing):
        return dict(max_memory), ahead
    while ahead and sum(slot_sizes(blocks, ahead)) > max_memory[main] / 2:
        ahead -= 1
    more = sum(slot_sizes(blocks, ahead)) - (one if main == computing[0] else 0)
    return {**max_memory, main: max(0, int(max_memory[main] - more))}, ahead


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    for each in hooks:
        if isinstance(each, AlignDevicesHook) and each.offload and hasattr(each.weights_map, "dataset"):
            return each
    return None


def _unhook(module: nn.Module) -> None:
    """Take accelerate's hook away, and what it leaves behind: a ``forward`` of the class that the module has now."""
    remove_hook_from_module(module)
    left = module.__dict__.get("forward")
    if getattr(left, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]


def _device(place: Any) -> Any:
    return torch.device("cuda", place) if isinstance(place, int) else place


def _tied(model: PreTrainedModel) -> set[str]:
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*ties, *ties.values()}


class _Files:
    """Headers of safetensors files, each read once."""

    def __init__(self) -> None:
        self._headers: dict[str, Header] = {}

    def find(self, info: Mapping[str, str], parameter: nn.Parameter) -> FileRange | None:
        """Where the bytes of a parameter lie; None unless they are there as they are wanted."""
        path = info.get("safetensors_file")
        if path is None:
            return None
        if path not in self._headers:
            self._headers[path] = read_header(path)
        header, name = self._headers[path], info["weight_name"]
        for entry in header.tensors:
            if entry.name == name:
                same = TORCH_DTYPES.get(entry.dtype) == parameter.dtype and entry.shape == tuple(parameter.shape)
                return FileRange(Path(path), header.data_start + entry.begin, entry.nbytes) if same else None
        return None


def _ranges(
    name: str, module: nn.Module, hooks: Iterable[AlignDevicesHook], files: _Files
) -> dict[str, FileRange] | None:
    """Where the parameters of a block lie that are in files; None if it cannot be told."""
    (loader,) = {id(hook.weights_map.dataset): hook.weights_map.dataset for hook in hooks}.values()
    found: dict[str, FileRange] = {}
    for own, parameter in module.named_parameters():
        full = f"{name}.{own}"
        if full in loader.state_dict:
            continue
        place = files.find(loader.index.get(full, {}), parameter)
        if place is None:
            return None
        found[full] = place
    return found
