"""Compress and decompress whole models in place, parameter by parameter."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from bitforbit.errors import UsageError
from bitforbit.nn import layout as layouts
from bitforbit.nn import siblings
from bitforbit.nn.classes import Compressed
from bitforbit.nn.parameters import compress_parameter, install_parameter, remove_parameter
from bitforbit.nn.spec import CompressedSpec
from bitforbit.nn.values import decode
from bitforbit.ops import MODES

_log = logging.getLogger("bitforbit")


def compress_model(
    module: nn.Module, mode: str = "exact", skip: Iterable[str] = (), threads: int | None = None
) -> nn.Module:
    """Compress the floating-point parameters of a model in place, one after the other, and return the model.

    Parameters of two and more dimensions are compressed where that makes them smaller; they are frozen. Tied ones stay
    tied. skip holds patterns (as in a shell: ``*`` matches anything) of names of modules or parameters to leave plain,
    such as ``"lm_head"`` or ``"*.experts.*"``. mode is ``"exact"`` (outputs are those of the plain model, bit for
    bit) or ``"fused"`` (exact weights, multiplied by our kernels). threads defaults to ``BITFORBIT_THREADS``, else all
    CPUs.

    Left plain: vectors (they are small, and would be decoded at every step), recurrent layers, embeddings with
    ``max_norm``, and modules that compute their weights from others (weight norm and other parametrizations).

    Parameters in GPU memory are compressed there, those in BF16 straight to the layout for GPUs (:func:`set_layout`).

    Raises UsageError for an unknown mode or parameters on any other device.
    """
    if mode not in MODES:
        raise UsageError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    patterns = tuple(skip)
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, child in module.named_modules():
        reason = left_plain(child)
        for name, plain in list(child._parameters.items()):
            if plain is None or plain.dim() < 2 or not plain.is_floating_point():
                continue
            path = f"{prefix}.{name}" if prefix else name
            if reason is not None:
                _log.info("%s is left plain: %s", path, reason)
            elif not _matches(prefix, path, patterns):
                uses.setdefault(id(plain), []).append((child, name))
    for first, *others in uses.values():
        _compress_tied(first, others, mode, threads)
    set_mode(module, mode)
    siblings.find(module)
    return module


def _compress_tied(
    first: tuple[nn.Module, str], others: list[tuple[nn.Module, str]], mode: str, threads: int | None
) -> None:
    child, name = first
    if not compress_parameter(child, name, mode=mode, threads=threads):
        return
    assert isinstance(child, Compressed)
    spec = child._bitforbit_specs[name]
    shared = dict(zip(spec.part_names, child._bitforbit_parts(name), strict=True))
    for other, other_name in others:
        install_parameter(other, other_name, spec, shared, mode=mode)


def left_plain(module: nn.Module) -> str | None:
    """Why a module's own parameters cannot be compressed."""
    if isinstance(module, nn.RNNBase):
        return "recurrent layers keep further references to their weights"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "max_norm changes the weight in place"
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
        return "its weights are parametrized"
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    if any(name in ("WeightNorm", "SpectralNorm") for name in hooks):
        return "its weight is computed from others at every step"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a script module"
    return None


def _matches(prefix: str, path: str, patterns: tuple[str, ...]) -> bool:
    ancestors = prefix.split(".") if prefix else []
    names = [path, *(".".join(ancestors[: i + 1]) for i in range(len(ancestors)))]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def decompress_model(module: nn.Module) -> nn.Module:
    """Make every compressed parameter plain again, in place, and return the model; tied ones stay tied.

    Modules get their plain classes back. The parameters are frozen (``requires_grad`` is False). Raises
    CorruptTensorError.
    """
    plain: dict[tuple[int, CompressedSpec], nn.Parameter] = {}
    for child, name in _compressed(module):
        spec, parts = child._bitforbit_specs[name], child._bitforbit_parts(name)
        key = id(parts[0]), spec
        if key not in plain:
            plain[key] = nn.Parameter(decode(spec, parts), requires_grad=False)
        remove_parameter(child, name, plain[key])
    return module


def set_mode(module: nn.Module, mode: str) -> None:
    """Set the mode, ``"exact"`` or ``"fused"``, of every compressed module in a model. Raises UsageError."""
    if mode not in MODES:
        raise UsageError(f"expected a mode among {', '.join(MODES)}, got {mode!r}")
    for child in module.modules():
        if isinstance(child, Compressed):
            child.__dict__["_bitforbit_mode"] = mode


def set_layout(module: nn.Module, layout: str) -> nn.Module:
    """Convert the compressed parameters of a module and of all in it, in place and one by one, and return it.

    ``"tiles"``, for GPUs: BF16 parameters, where that is smaller than BF16; others stay as they are. ``"planes"``: the
    layout of the files, also in GPU memory, which later moves keep. ``"auto"``, the default: tiles on a GPU, planes
    elsewhere. Every layout computes the same bits. Parameters on the meta device (offloaded ones) stay as they are.

    Raises UsageError for an unknown layout, and for tiles where parameters are not on a GPU.
    """
    layouts.check(layout)
    for child in module.modules():
        if isinstance(child, Compressed):
            layouts.choose(child, layout)
    return module


@dataclass(frozen=True)
class CompressedSize:
    """Sizes of a model: parameters and buffers, tied ones counted once."""

    compressed_nbytes: int
    """Bytes of the parts of compressed parameters."""
    compressed_elements: int
    """Elements of these parameters."""
    original_nbytes: int
    """Bytes that these parameters had."""
    plain_nbytes: int
    """Bytes of everything else."""

    @property
    def nbytes(self) -> int:
        """Bytes of the model as it is."""
        return self.compressed_nbytes + self.plain_nbytes

    @property
    def ratio(self) -> float:
        """Bytes of the model as it is per byte of the plain model."""
        return self.nbytes / max(1, self.original_nbytes + self.plain_nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Bits per element of the compressed parameters."""
        return 8 * self.compressed_nbytes / max(1, self.compressed_elements)


def compressed_size(module: nn.Module) -> CompressedSize:
    """Sizes of a model as it is and as it was, in bytes."""
    parts: dict[int, torch.Tensor] = {}
    counted: set[tuple[int, CompressedSpec]] = set()
    elements = original = 0
    for child, name in _compressed(module):
        spec, own = child._bitforbit_specs[name], child._bitforbit_parts(name)
        if (id(own[0]), spec) not in counted:
            elements += spec.elements
            original += spec.nbytes
        counted.add((id(own[0]), spec))
        parts |= {id(part): part for part in own}
    rest = {id(t): t for t in (*module.parameters(), *module.buffers()) if id(t) not in parts}
    return CompressedSize(_nbytes(parts.values()), elements, original, _nbytes(rest.values()))


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _compressed(module: nn.Module) -> Iterator[tuple[Compressed, str]]:
    for child in list(module.modules()):
        if isinstance(child, Compressed):
            for name in list(child._bitforbit_specs):
                yield child, name
