"""The caches that the benchmarks of longer contexts compare, and how large they are.

``bitforbit``: KiviCache. ``QuantizedCache``: transformers' own, with optimum-quanto or HQQ as back end, where these are
installed; it keeps up to 128 new tokens exact, then quantizes everything again. ``rounded``: the 16-bit cache whose
keys and values are rounded token by token, groups of channels, no exact window: the cheapest idea, and no memory saved.
``fake``: KIVI by rounding the 16-bit cache in place, in a few lines that share the quantizer's formulas only: the
check of what the packed cache gives.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache

from bitforbit.integrations.transformers.kv import KiviCache
from bitforbit.integrations.transformers.kv.model import set_attention
from bitforbit.kv.naive import dequantize, quantize_groups
from bitforbit.kv.spec import KiviSpec


@dataclass(frozen=True)
class Variant:
    """A cache to be measured. ``make`` gets the model; ``nominal``: bits of an element where nothing is packed."""

    name: str
    make: Callable[[Any], Cache]
    family: str
    attention: str = "sdpa"
    nominal: float | None = None
    settings: str = ""
    spec: KiviSpec | None = None


class RoundedLayer(DynamicLayer):
    """Keys and values are rounded as they come, groups of channels of each token."""

    def __init__(self, bits: int, group: int) -> None:
        super().__init__()
        self.bits, self.group = bits, group

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; the first call returns them exact, as the other quantized caches do."""
        first = not self.is_initialized
        rounded = super().update(*(_rounded(x, self.bits, self.group) for x in (key_states, value_states)))
        return (key_states, value_states) if first else rounded


class FakeKiviLayer(DynamicLayer):
    """A 16-bit cache in which what has left the exact window is rounded in place, before the next tokens come."""

    def __init__(self, spec: KiviSpec) -> None:
        super().__init__()
        self.spec, self.keys_done, self.values_done = spec, 0, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens."""
        if self.is_initialized:
            self._round(self.get_seq_length())
        return super().update(key_states, value_states)

    def _round(self, tokens: int) -> None:
        spec, sink = self.spec, self.spec.sink
        keys, values = spec.keys_quantized(tokens), spec.values_quantized(tokens)
        for begin in range(self.keys_done, keys, spec.group):
            part = self.keys[:, :, sink + begin : sink + begin + spec.group]
            part.copy_(_rounded(part.mT, spec.k_bits, spec.group).mT)
        if values > self.values_done:
            part = self.values[:, :, sink + self.values_done : sink + values]
            part.copy_(_rounded(part, spec.v_bits, spec.value_group))
        self.keys_done, self.values_done = keys, values


def _rounded(x: Tensor, bits: int, group: int) -> Tensor:
    codes, scale, zero = quantize_groups(x.unflatten(-1, (-1, group)), bits, torch.bfloat16)
    return dequantize(codes, scale[..., None], zero[..., None]).flatten(-2).to(x.dtype)


def _layers(model: Any, make: Callable[[], DynamicLayer]) -> Cache:
    return Cache(layers=[make() for _ in range(model.config.num_hidden_layers)])


def exact(attention: str = "sdpa") -> Variant:
    """The model's own cache; with ``attention`` "eager", what another order of summation alone does."""
    name = "16 bits" if attention == "sdpa" else f"16 bits, {attention} attention"
    return Variant(name, lambda model: DynamicCache(config=model.config), "16 bits", attention, 16.0)


def kivi(k_bits: int, v_bits: int, group: int = 32, residual: int | None = 128, sink: int = 0) -> Variant:
    """The cache of this project. Values are in groups of ``group`` channels, or of what divides the head."""
    bits = str(k_bits) if k_bits == v_bits else f"K{k_bits}V{v_bits}"
    settings = f"group {group}, window {residual}" + (f", {sink} sinks" if sink else "")

    def make(model: Any) -> Cache:
        return KiviCache(model.config, k_bits, v_bits, group=group, residual=residual, sink=sink)

    spec = KiviSpec(k_bits, v_bits, group=group, residual=residual, sink=sink)
    return Variant(f"bitforbit {bits}", make, "bitforbit", "bitforbit_kivi", settings=settings, spec=spec)


def fake_kivi(k_bits: int, v_bits: int, group: int = 32, residual: int = 128, sink: int = 0) -> Variant:
    """What :func:`kivi` must give, by rounding in place. The head dimension must be a multiple of ``group``."""
    spec = KiviSpec(k_bits, v_bits, group=group, residual=residual, sink=sink)
    nominal = (spec.key_bits_per_element + spec.value_bits_per_element) / 2
    return Variant(
        f"fake K{k_bits}V{v_bits}", lambda model: _layers(model, lambda: FakeKiviLayer(spec)), "fake", nominal=nominal,
        spec=spec,
    )  # fmt: skip


def rounded(bits: int, group: int = 32) -> Variant:
    """Rounding per token."""
    make = lambda model: _layers(model, lambda: RoundedLayer(bits, group))  # noqa: E731
    return Variant(f"rounded {bits}", make, "rounded", nominal=bits + 32 / group, settings=f"group {group}, no window")


PACKAGES = {"quanto": "optimum", "hqq": "hqq"}
BEST_AXES = {"quanto": (-1, 0), "hqq": (0, 1)}
"""Keys by channel, values by token, as KIVI: what the back ends call ``axis_key`` and ``axis_value``."""


def installed(backend: str) -> bool:
    """Whether a back end of QuantizedCache is there."""
    return importlib.util.find_spec(PACKAGES[backend]) is not None


def quantized(backend: str, bits: int, group: int = 64, best: bool = False, residual: int = 128) -> Variant:
    """transformers' QuantizedCache, with its default axes or those of KIVI."""
    axis_key, axis_value = BEST_AXES[backend] if best else (0, 0)

    def make(model: Any) -> Cache:
        return QuantizedCache(
            backend, model.config, nbits=bits, axis_key=axis_key, axis_value=axis_value, q_group_size=group,
            residual_length=residual,
        )  # fmt: skip

    axes = "KIVI's axes" if best else "default axes"
    return Variant(f"QuantizedCache {backend} {bits}", make, "QuantizedCache", settings=f"group {group}, {axes}")


def use(model: Any, variant: Variant) -> Cache:
    """A new cache, and the model's attention set to what it needs."""
    if variant.attention == "bitforbit_kivi":
        set_attention(model)
    elif model.config._attn_implementation != variant.attention:
        model.set_attn_implementation(variant.attention)
    return variant.make(model)


def hand_over(source: DynamicCache, cache: Cache) -> None:
    """Fill a cache as a prefill would: with all keys and values at once, which were attended to exactly."""
    for index, layer in enumerate(source.layers):
        cache.update(layer.keys.clone(), layer.values.clone(), index)
        attended = getattr(cache.layers[index], "attended", None)
        if attended is not None:
            attended()


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors that an object holds, those within other objects too; wrapped ones by what they are made of."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, str | bytes | int | float | type | torch.dtype | torch.device):
        return
    seen.add(id(value))
    if isinstance(value, Tensor) and type(value) is Tensor:
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors(item, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value), seen)


def num_bytes(value: Any) -> int:
    """Bytes of all memory behind the tensors that an object holds, each piece once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(value)}
    return sum(storages.values())


def quantized_bits(variant: Variant, cache: Cache) -> float:
    """Bits of a quantized element, scales and zeros included, counted from the tensors; 16 where there are none."""
    if variant.nominal is not None:
        return variant.nominal
    layer: Any = cache.layers[0]
    if variant.family == "bitforbit":
        from bitforbit.kv.layout import SEGMENT_TOKENS

        state = layer.state
        if not state.segments:
            return 16.0
        rows = state.batch * state.heads
        return 8 * state.segments[0].nbytes / (2 * rows * SEGMENT_TOKENS * state.head_dim)
    parts = (layer._quantized_keys, layer._quantized_values)
    elements = sum(layer._dequantize(part).numel() for part in parts)
    return 8 * sum(map(num_bytes, parts)) / elements


def whole_bits(variant: Variant, cache: Cache, elements: int) -> float:
    """Bits per element of the whole cache, exact window and unused room included."""
    if variant.family in ("rounded", "fake"):
        return float("nan")  # nothing is packed
    return 8 * num_bytes(list(cache.layers)) / elements
