"""Models that do not fit: some blocks are in host memory or files, compressed, and come to the device as they run."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from bitforbit.errors import StreamedModelError, UsageError
from bitforbit.nn import layout
from bitforbit.offload.image import FileRange, Image, Key
from bitforbit.offload.modules import Block, Found, Stored
from bitforbit.offload.movers import mover_for
from bitforbit.offload.ring import Ring
from bitforbit.offload.stores import FileStore, HostStore, Store, to_host
from bitforbit.ops.gpu import volatile

_CHECKPOINT = "_gradient_checkpointing_func"

AHEAD = 2
"""Blocks that are on their way while one runs, unless said otherwise."""


def stream_blocks(
    blocks: Mapping[str, nn.Module], device: torch.device | str, *, ahead: int = AHEAD,
    stored: Mapping[str, Stored] | None = None, drop_cache: bool = True,
) -> Stream:  # fmt: skip
    """Let modules run on a device that has room for a few of them only, in place.

    ``blocks`` are in the order in which they run, by name; another order is learned from the first pass. No block may
    be within another one, or share parameters with anything else. Their parameters are frozen and, but for those that
    require gradients, leave the modules: for host memory, or where ``stored`` says for full names
    (``"layers.0.mlp.up.code__weight"``): tensors, or ranges of files, which are read each time. Buffers go to the
    device and stay there. On the device are ``ahead + 1`` blocks at most; while one runs, the next ``ahead`` arrive.
    On a GPU compressed parameters in host memory are kept in the layout that runs there. ``drop_cache``: what was read
    from files does not stay in the system's page cache.

    A forward may raise BlockReadError. Backward passes work, of adapters and inputs: each block whose inputs or
    adapters require gradients gets memory of its own on the device until its backward has run.

    Raises UsageError for parameters that are nowhere or shared, BlockReadError, OSError for files that are not there.
    """
    if not blocks or ahead < 0:
        raise UsageError(f"expected at least one block, and ahead of at least 0, got {len(blocks)} and {ahead}")
    return Stream(blocks, torch.device(device), ahead, stored or {}, drop_cache)


class Stream:
    """Blocks that share the slots of one device. Made by :func:`stream_blocks`, alive as long as any of its blocks."""

    def __init__(
        self, blocks: Mapping[str, nn.Module], device: torch.device, ahead: int, stored: Mapping[str, Stored],
        drop_cache: bool,
    ) -> None:  # fmt: skip
        _check_apart(blocks)
        self._mover = mover_for(device)
        self.device = self._mover.device
        self._drop_cache = drop_cache
        self._lock = threading.RLock()
        self._blocks = [Block(name, module) for name, module in blocks.items()]
        self._stores = [self._take(block, stored) for block in self._blocks]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what conversion took: slots are of other sizes
        self._ring = Ring(self._stores, self._mover, ahead)
        self._forwards = [_Forward(self, number, block.module) for number, block in enumerate(self._blocks)]
        for block, forward in zip(self._blocks, self._forwards, strict=True):
            block.module.__dict__["forward"] = forward

    @property
    def names(self) -> list[str]:
        """Of the blocks."""
        return [block.name for block in self._blocks]

    @property
    def slot_bytes(self) -> int:
        """Memory on the device that the blocks pass through."""
        return self._ring.nbytes

    @property
    def host_bytes(self) -> int:
        """Memory of the blocks that are in host memory."""
        return sum(store.nbytes for store in self._stores if store.in_memory is not None)

    @property
    def file_bytes(self) -> int:
        """Bytes of the blocks that are in files."""
        return sum(store.nbytes for store in self._stores if store.in_memory is None)

    @property
    def fetched(self) -> tuple[int, int]:
        """How many blocks were fetched so far, and how many of them only when they were to run."""
        return self._ring.fetched, self._ring.late

    def tensors(self, name: str) -> Mapping[str, torch.Tensor]:
        """The streamed parameters of a block, by name relative to it, read when they are asked for.

        They are in CPU memory, compressed ones as planes. Raises BlockReadError.
        """
        number = self.names.index(name)
        return _Tensors(self._blocks[number], self._stores[number], self.device)

    def remove(self, name: str, *, load: bool = False) -> None:
        """Undo the streaming of one block: what is in host memory becomes its parameters, there.

        Parameters in files stay on the meta device, unless they are to be loaded. Called again, it takes away what
        others had put their own ``forward`` over meanwhile. Raises BlockReadError.
        """
        with self._lock:
            number = self.names.index(name)
            block, store = self._blocks[number], self._stores[number]
            forward, attributes = self._forwards[number], block.module.__dict__
            if attributes.get("forward") is forward:
                del attributes["forward"]
                if forward.was_own:
                    attributes["forward"] = forward.inner
            if forward.over:
                return
            forward.over = True
            block.forget()
            if load or store.in_memory is not None:
                for member, module, own in block.names().values():
                    tensor = block.tensor(member, module, own, store, self.device)
                    member.module._parameters[own] = nn.Parameter(tensor.clone(), requires_grad=False)

    def run(self, number: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The forward of a block. Those of other threads wait for it."""
        block = self._blocks[number]
        with self._lock:
            if block.runs:
                return forward(*args, **kwargs)
            self._refuse_capture()
            image = self._ring.enter(number)
            try:
                if torch.is_grad_enabled() and (
                    block.trains() or any(tensor.requires_grad for tensor in _tensors((args, kwargs)))
                ):
                    image = image.clone()  # which lives as long as the graph
                block.install(image)
                try:
                    with _checkpointing(block.module, functools.partial(self._again, number)):
                        return _kept(forward(*args, **kwargs))
                finally:
                    block.remove()
            finally:
                self._ring.leave(number)

    def _again(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.run(number, forward, args, kwargs)

    def _take(self, block: Block, stored: Mapping[str, Stored]) -> Store:
        found = block.collect(stored, self.device, layout.is_gpu(self.device))
        in_files = {key: each.value for key, each in found.items() if isinstance(each.value, FileRange)}
        if in_files and len(in_files) == len(found):
            order = sorted(found, key=lambda key: in_files[key])
            image = _image(order, found)
            store: Store = FileStore(block.name, image, in_files.items(), self._drop_cache)
        else:
            image = _image(list(found), found)
            memory = self._mover.pinned(image.nbytes)
            if in_files:
                memory.copy_(to_host(FileStore(block.name, image, in_files.items(), self._drop_cache)))
            for key, piece in image.pieces.items():
                value = found[key].value
                if isinstance(value, torch.Tensor):
                    piece.view(memory).copy_(value)
            store = HostStore(block.name, image, memory)
        block.rest(image, self.device)
        block.tell(store, self.device)
        return store

    def _refuse_capture(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise StreamedModelError(
                "expected no CUDA graph to be captured over blocks that are streamed: their memory changes between "
                "replays; run the model without graphs, or keep all of it on the GPU"
            )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickled")


def _refuse(what: str) -> NoReturn:
    raise StreamedModelError(
        f"a model with blocks in host memory or files cannot be {what}; load it again, or use save_pretrained or "
        "state dicts"
    )


class _Forward:
    """In the place of a block's ``forward``."""

    def __init__(self, stream: Stream, number: int, module: nn.Module) -> None:
        self.stream = stream
        self.number = number
        self.inner: Callable[..., Any] = module.forward
        self.was_own = "forward" in module.__dict__
        """Whether it was an attribute of the module already, as hooks of libraries are."""
        self.over = False
        """Whether the block is streamed no more: others may still hold this."""
        self.__wrapped__ = self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.over:
            return self.inner(*args, **kwargs)
        run = _outside_graphs() if torch.compiler.is_compiling() else Stream.run
        return run(self.stream, self.number, self.inner, args, kwargs)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickled")


_disabled: list[Callable[..., Any]] = []


def _outside_graphs() -> Callable[..., Any]:
    if not _disabled:  # made when it is needed: it imports all of torch's compiler
        _disabled.append(torch.compiler.disable(Stream.run))
    return _disabled[0]


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, block: Block, store: Store, device: torch.device) -> None:
        self._block = block
        self._store = store
        self._device = device
        self._names = block.names()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._block.tensor(*self._names[name], self._store, self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def _checkpointing(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Have forwards that checkpoint themselves, as layers of transformers do, run through ``run`` in the backward pass.

    There they are computed again, when their parameters have left.
    """
    modules = module.modules() if torch.is_grad_enabled() else ()
    holders = [each.__dict__ for each in modules if _CHECKPOINT in each.__dict__]
    before = [own[_CHECKPOINT] for own in holders]
    for own, checkpoint in zip(holders, before, strict=True):
        own[_CHECKPOINT] = functools.partial(_checkpoint_through, run, checkpoint)
    try:
        yield
    finally:
        for own, checkpoint in zip(holders, before, strict=True):
            own[_CHECKPOINT] = checkpoint


def _checkpoint_through(
    run: Callable[..., Any], checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return checkpoint(functools.partial(run, forward), *args, **kwargs)


def _image(order: list[Key], found: Mapping[Key, Found]) -> Image:
    return Image.of([(key, found[key].dtype, found[key].shape) for key in order])


def _check_apart(blocks: Mapping[str, nn.Module]) -> None:
    """Raise UsageError for blocks within blocks, and parameters that two of them share."""
    owner: dict[int, str] = {}
    for name, module in blocks.items():
        things = {id(each) for each in (*module.modules(), *module.parameters())}
        for thing in things:
            if thing in owner:
                raise UsageError(f"expected blocks that share nothing, got {owner[thing]!r} and {name!r}, which do")
        owner |= dict.fromkeys(things, name)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those in arguments or outputs. Caches of keys and values are left alone: some refuse to be taken apart."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, tuple | list):
            left.extend(value)
        elif dataclasses.is_dataclass(value):
            left.extend(vars(value).values())


def _kept(output: Any) -> Any:
    """A block's output, in no memory that other blocks pass through."""
    if any(map(volatile.holds, _tensors(output))):
        return tree_map_only(torch.Tensor, lambda t: t.clone() if volatile.holds(t) else t, output)
    return output
