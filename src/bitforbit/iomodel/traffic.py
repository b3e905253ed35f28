"""Bytes that a language model moves for every generated token: weights, KV cache, activations; and the time they take.

While text is generated, every weight and the whole cache pass by once per step, whatever else happens: that, over the
bandwidth of the level they come from, is the least time a step can take. Estimates, not measurements: they leave out
arithmetic, launches and what does not overlap. They are good for order: which of two settings is faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitforbit.errors import IoModelError
from bitforbit.iomodel.machine import Level, Machine


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer with gated MLPs. ``experts`` of which ``experts_per_token`` are used."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 1
    experts_per_token: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise IoModelError(f"{name}: expected a positive number, got {value!r}")
        if self.heads % self.kv_heads or self.experts_per_token > self.experts:
            raise IoModelError(
                f"expected kv_heads to divide heads and experts_per_token within experts, got {self.kv_heads} of "
                f"{self.heads} and {self.experts_per_token} of {self.experts}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the fields of a Hugging Face config.json, or its ``text_config``.

        Layers with a sliding window count as if they saw everything. Raises IoModelError for fields that are missing,
        and for latent attention, whose cache is of another kind.
        """
        config = config.get("text_config", config)
        if config.get("kv_lora_rank"):
            raise IoModelError("expected keys and values per head, got latent attention (kv_lora_rank)")
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            experts = config.get("num_local_experts") or config.get("num_experts") or 1
            return cls(
                layers=config["num_hidden_layers"],
                hidden=hidden,
                intermediate=(experts > 1 and config.get("moe_intermediate_size")) or config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                vocab=config["vocab_size"],
                experts=experts,
                experts_per_token=config.get("num_experts_per_tok") or 1,
            )
        except KeyError as missing:
            raise IoModelError(f"expected a config of a decoder-only transformer, got one without {missing}") from None

    def weights_per_step(self, batch: int = 1) -> float:
        """Weights read by one step: all but the embedding; of experts those that so many tokens are expected to use."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        used = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** batch)
        return self.layers * (attention + used * 3 * self.hidden * self.intermediate) + self.vocab * self.hidden

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values that a token leaves in the cache, together."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class StepTraffic:
    """Bytes moved by one step, which makes one token for each sequence of the batch."""

    weights: float
    kv_read: float
    kv_written: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.kv_read + self.kv_written + self.activations


def step_traffic(
    shape: ModelShape,
    context: int,
    *,
    batch: int = 1,
    bits_per_weight: float = 16.0,
    k_bits: float = 16.0,
    v_bits: float = 16.0,
    exact_tokens: int = 0,
    item_bytes: int = 2,
) -> StepTraffic:
    """Bytes of a step with ``context`` tokens in the cache.

    ``k_bits`` and ``v_bits`` are bits per element with scales (KiviSpec.key_bits_per_element), ``exact_tokens`` those
    of the window and the sink, kept in ``item_bytes`` each. Activations: what each product reads and writes. Raises
    IoModelError.
    """
    if context < 0 or batch < 1 or exact_tokens < 0 or min(bits_per_weight, k_bits, v_bits, item_bytes) <= 0:
        raise IoModelError(
            f"expected context >= 0, batch >= 1, exact_tokens >= 0 and positive bits, got {context}, {batch}, "
            f"{exact_tokens}, {bits_per_weight}, {k_bits}, {v_bits}"
        )
    exact = min(exact_tokens, context) if min(k_bits, v_bits) < 8 * item_bytes else context
    half = shape.kv_elements_per_token / 2
    per_token = half * ((context - exact) * (k_bits + v_bits) / 8 + exact * 2 * item_bytes)
    mixed = (shape.heads + shape.kv_heads) * shape.head_dim  # in and out of attention's four products, by two
    per_layer = 2 * shape.hidden + 2 * mixed + shape.experts_per_token * (2 * shape.hidden + 3 * shape.intermediate)
    return StepTraffic(
        weights=shape.weights_per_step(batch) * bits_per_weight / 8,
        kv_read=batch * per_token,
        kv_written=batch * 2 * half * item_bytes,
        activations=batch * item_bytes * (shape.layers * per_layer + shape.hidden + shape.vocab),
    )


def bytes_by_level(traffic: StepTraffic, machine: Machine) -> dict[str, float]:
    """Bytes that each cache or memory delivers during a step, outermost first.

    Weights and cache are read in turn and in whole: a level that does not hold all that passes by has lost each piece
    before it comes again, and everything comes from the level beyond. Activations stay in the closest level that holds
    them.
    """
    moved: dict[str, float] = {}
    stream, small = traffic.weights + traffic.kv_read + traffic.kv_written, traffic.activations
    keeping = [level for level in machine.levels if level.cache]
    for outer, inner in zip(reversed(keeping), [*reversed(keeping[:-1]), None], strict=True):
        moved[outer.name] = stream + small
        if inner is not None and _holds(inner, stream + small):
            moved[outer.name] = 0.0
        elif inner is not None and _holds(inner, small):
            moved[outer.name] = stream
    return moved


def predict_seconds(traffic: StepTraffic, machine: Machine) -> float:
    """Least time of a step: of all levels whose bandwidth is known the one that takes longest. Raises IoModelError."""
    moved = bytes_by_level(traffic, machine)
    known = {level.name: level.bandwidth for level in machine.levels if level.cache and level.bandwidth}
    if not known:
        raise IoModelError(f"{machine.name}: expected a known bandwidth, got none; measure it (with_bandwidths)")
    return max(moved[name] / bandwidth for name, bandwidth in known.items())


def _holds(level: Level, nbytes: float) -> bool:
    return nbytes <= level.nbytes * level.units
