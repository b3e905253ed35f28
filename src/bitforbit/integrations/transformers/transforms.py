"""What the stock loader of transformers does with compressed tensors on their way into the model.

Three cases. A part that is stored just as it is wanted is renamed, and nothing else (so that it can stay in its file
when it is offloaded). A unit that must be decoded (experts that are merged, another dtype, DFloat11) goes in under
the name of its anchor; a converter fetches the tensors, lets the model's own conversions run, and compresses the
results. The other stored tensors of such a unit are swallowed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

SWALLOWED = "⟨⟩"
"""A key with this in it is of no use to the loader."""

_TOKEN = re.compile(r"⟨(\d+)⟩")
_RESTORE = "bitforbit-restore"


class Work(Protocol):
    """What the converters ask of the load that they belong to.

    The loader copies converters for every parameter: the load must be its own deep copy.
    """

    @property
    def arrivals(self) -> Collection[str]:
        """Parameters under whose names the anchors of units arrive that need no conversion."""
        ...

    @property
    def device(self) -> torch.device | None:
        """Where this process's parts of parameters go, if the model is split over processes."""
        ...

    def is_anchor(self, key: str) -> bool:
        """Whether a stored tensor is a unit's anchor."""
        ...

    def part(self, anchor: str, target: str, index: int) -> torch.Tensor | None:
        """This process's part of a unit's one tensor, on its device; None if it has none.

        The tensor is the ``index``-th of those that a conversion makes a parameter of.
        """
        ...

    def decoded(self, anchor: str) -> torch.Tensor | None:
        """The one tensor of a unit; None if this is no anchor but an ordinary stored tensor."""
        ...

    def restored(self, anchor: str) -> dict[str, torch.Tensor]:
        """The tensors of a unit by parameter."""
        ...

    def kept(self, anchor: str, device: torch.device, missing_keys: set[str] | None) -> dict[str, torch.Tensor] | None:
        """What is to be loaded, by name, for a unit that stays as it is stored; None if it does not."""
        ...

    def dtype(self, target: str) -> torch.dtype:
        """The dtype that a parameter is to have."""
        ...

    def finish(self, name: str, value: torch.Tensor, missing_keys: set[str] | None) -> dict[str, torch.Tensor]:
        """What is to be loaded, by name, for a parameter and its value."""
        ...


class Disguise(WeightRenaming):
    """First of all renamings: gives stored names a form in which the model's own rules find what they are to find.

    names maps stored names to what comes next: an original name, or a token (see :func:`token`).
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__("bitforbit-disguise", "bitforbit-disguise")
        self._names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The key's next form."""
        return self._names.get(source_key, source_key), None

    def was_used(self) -> bool:
        """Not when the model is saved."""
        return False


class Reveal(WeightRenaming):
    """Last of all renamings: tokens become names of parameters, whatever was put before or behind them."""

    def __init__(self, targets: Sequence[str]) -> None:
        super().__init__("bitforbit-reveal", "bitforbit-reveal")
        self._targets = targets

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The key's last form."""
        match = _TOKEN.search(source_key)
        return (self._targets[int(match[1])] if match else source_key), None

    def was_used(self) -> bool:
        """Not when the model is saved."""
        return False


def token(index: int) -> str:
    """Stands for the target of that index in :class:`Reveal`. Holds nothing that a rule would match."""
    return f"⟨{index}⟩"


class _Nothing(ConversionOps):
    """A converter must have an operation."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Returns its argument."""
        return input_dict


class Restore(WeightConverter):
    """Units whose tensors are parameters of the model as they are."""

    def __init__(self, work: Work) -> None:
        super().__init__([_RESTORE], [_RESTORE], [_Nothing()])
        self._work = work
        self._anchor = ""

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The key as it is, and whether it is one of ours."""
        return source_key, _RESTORE if source_key in self._work.arrivals else None

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """As the base class; remembers the unit."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        self._anchor = source_key

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, torch.Tensor]:
        """The unit's tensors, compressed."""
        device = self._work.device
        if device is None:
            (collected,) = super().materialize_tensors().values()
            device = collected[0].device  # where the loader has put the anchor
        else:
            self.collected_tensors.clear()  # parts of an anchor are of no use
        missing_keys = loading_info.missing_keys if loading_info else None
        kept = self._work.kept(self._anchor, device, missing_keys)
        if kept is not None:
            return kept
        restored = {name: value.to(device) for name, value in self._work.restored(self._anchor).items()}
        return _compressed(self._work, restored, missing_keys)

    def was_used(self) -> bool:
        """Not when the model is saved."""
        return False


class Converting(WeightConverter):
    """One of the model's own converters, with decoded tensors for anchors, and its results compressed."""

    def __init__(self, stock: WeightConverter, work: Work) -> None:
        sources, targets = list(stock._original_source_patterns), list(stock._original_target_patterns)
        super().__init__(sources, targets, stock.operations)
        self.scope_prefix, self.base_model_prefix = stock.scope_prefix, stock.base_model_prefix
        self._stock = stock
        self._work = work
        self._keys: dict[str, list[str]] = {}
        self._target = ""
        self._dtype: torch.dtype | None = None

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As the stock converter, which notes its use: that decides what is undone when the model is saved."""
        renamed: tuple[str, str | None] = self._stock.rename_source_key(source_key)
        return renamed

    @property
    def stock(self) -> WeightConverter:
        """The model's own."""
        return self._stock

    def was_used(self) -> bool:
        """Whether the stock converter was."""
        return bool(self._stock.was_used())

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """As the base class; remembers which stored tensors they are, in order."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        self._keys.setdefault(source_pattern, []).append(source_key)
        self._dtype, self._target = self._work.dtype(target_key), target_key

    def materialize_tensors(self) -> dict[str, list[torch.Tensor]]:
        """As the base class, with decoded tensors for anchors, all of one dtype."""
        if self._work.device is not None:
            return self._parts()
        collected: dict[str, list[torch.Tensor]] = super().materialize_tensors()
        for pattern, keys in self._keys.items():
            for i, key in enumerate(keys):
                value = self._work.decoded(key)
                stored = collected[pattern][i]
                collected[pattern][i] = (stored if value is None else value).to(stored.device, self._dtype)
        return collected

    def _parts(self) -> dict[str, list[torch.Tensor]]:
        """This process's parts of the stored tensors; those that it has none of are left out."""
        parts: dict[str, list[torch.Tensor]] = {}
        for pattern, keys in self._keys.items():
            waiting = self.collected_tensors.pop(pattern)
            parts[pattern] = []
            for index, (key, loaded) in enumerate(zip(keys, waiting, strict=True)):
                if self._work.is_anchor(key):
                    part = self._work.part(key, self._target, index)
                else:
                    part = loaded.result() if isinstance(loaded, Future) else loaded()
                if part is not None:
                    parts[pattern].append(part.to(dtype=self._dtype))
        return parts

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, torch.Tensor]:
        """What the stock converter makes of the tensors, compressed."""
        converted = super().convert(layer_name, model, config, hf_quantizer, loading_info)
        return _compressed(self._work, converted, loading_info.missing_keys if loading_info else None)


class Compress(ConversionOps):
    """Last operation on a parameter of an ordinary checkpoint."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def convert(
        self, input_dict: dict[str, Any], missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """The parts of each tensor."""
        return _compressed(self._work, input_dict, missing_keys)


def _compressed(work: Work, loaded: Mapping[str, Any], missing_keys: set[str] | None) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        result |= work.finish(name, value[0] if isinstance(value, list) else value, missing_keys)
    return result
