"""What a model consists of, as far as memory is concerned: matrices by layer, and what attention keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bitforbit.errors import PlanError

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}
"""Dtypes of weights that can be planned for, and bytes of an element."""


MOST = 1 << 31
"""Numbers in a config.json that are taken for sizes."""
MOST_LAYERS = 4096


@dataclass(frozen=True)
class Matrix:
    """A weight ``[rows, cols]``, or a stack of ``count`` of them, of which a token uses the share ``used``.

    ``stored``: bytes of it in a compressed checkpoint, None if it is not known. ``heads``: it makes keys and values,
    and can be split over GPUs by key-value heads only.
    """

    name: str
    rows: int
    cols: int
    count: int = 1
    used: float = 1.0
    heads: bool = False
    stored: int | None = None

    @property
    def elements(self) -> int:
        """Weights, all of the stack."""
        return self.count * self.rows * self.cols

    def read(self, batch: int) -> float:
        """Share of it that a step of so many tokens is expected to read."""
        return float(1 - (1 - self.used) ** batch)


@dataclass(frozen=True)
class Layer:
    """``vectors``: elements of norms and biases, which stay as they are. ``window``: tokens seen; None: all of them."""

    matrices: tuple[Matrix, ...]
    vectors: int = 0
    window: int | None = None
    caches: bool = True

    @property
    def elements(self) -> int:
        """All parameters."""
        return sum(matrix.elements for matrix in self.matrices) + self.vectors


@dataclass(frozen=True)
class Dimensions:
    """Of a config.json. ``limit``: positions that the model was made for, None if unknown."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    limit: int | None = None
    dtype: str = "BF16"
    caps: bool = False
    """Attention caps its logits (Gemma 2), so that transformers computes all scores at once."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Dimensions:
        """From the fields of a config.json, or its ``text_config``. Raises PlanError."""
        config = text_config(config)
        if config.get("kv_lora_rank"):
            raise PlanError("expected keys and values per head, got latent attention (kv_lora_rank)")
        hidden, heads = number(config, "hidden_size", "n_embd"), number(config, "num_attention_heads", "n_head")
        head_dim = optional(config, "head_dim")
        if hidden % heads and not head_dim:
            raise PlanError(f"expected hidden_size to be a multiple of the heads, got {hidden} and {heads}")
        kv_heads = optional(config, "num_key_value_heads") or heads
        if heads % kv_heads:
            raise PlanError(f"expected key-value heads to divide the heads, got {kv_heads} of {heads}")
        return cls(
            hidden=hidden,
            layers=number(config, "num_hidden_layers", "n_layer", most=MOST_LAYERS),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim or hidden // heads,
            vocab=number(config, "vocab_size"),
            limit=optional(config, "max_position_embeddings", "n_positions"),
            dtype=_dtype(config),
            caps=bool(config.get("attn_logit_softcapping", config.get("model_type") == "gemma2")),
        )


@dataclass(frozen=True)
class Shape:
    """A language model. ``head`` None: the embedding is its head, too. ``other``: what lies beside the text model."""

    name: str
    dimensions: Dimensions
    embedding: Matrix
    layers: tuple[Layer, ...]
    head: Matrix | None
    vectors: int = 0
    other: tuple[Matrix, ...] = ()
    notes: tuple[str, ...] = field(default=())
    sizes_from: str = "config.json"
    compressed_bits: float | None = None
    """Bits per weight of the compressed checkpoint that was looked at; None if none was."""
    df11_bits: float | None = None
    """The same of a DFloat11 checkpoint."""

    @property
    def parameters(self) -> int:
        """Number of all parameters, shared ones once."""
        return sum(m.elements for m in self.matrices()) + self.vectors + sum(layer.vectors for layer in self.layers)

    def matrices(self) -> Iterator[Matrix]:
        """All of them, in the order of use."""
        yield self.embedding
        yield from self.other
        for layer in self.layers:
            yield from layer.matrices
        if self.head is not None:
            yield self.head

    @property
    def original_bytes(self) -> int:
        """Uncompressed."""
        return self.parameters * ITEM_BYTES[self.dimensions.dtype]

    @property
    def output(self) -> Matrix:
        """The matrix that makes logits."""
        return self.embedding if self.head is None else self.head

    @property
    def attention_width(self) -> int:
        """Numbers per token that attention has in memory beside the hidden states: queries, keys, values, outputs."""
        d = self.dimensions
        return (2 * d.heads + 2 * d.kv_heads) * d.head_dim

    @cached_property
    def mlp_width(self) -> int:
        """The same of the widest MLP."""
        return max((_mlp_width(layer, self.dimensions.hidden) for layer in self.layers), default=0)


def _mlp_width(layer: Layer, hidden: int) -> int:
    """With a gate: gate, up and their product. Without: what the steps of an activation such as GELU leave.

    Experts: also what they are given and return, for each expert that a token uses.
    """
    down = [
        (m, max(1, round(m.used * m.count))) for m in layer.matrices if m.name.startswith("mlp.") and "down" in m.name
    ]
    up = [m for m in layer.matrices if m.name.startswith("mlp.") and "down" not in m.name]
    inner = sum(m.cols * chosen for m, chosen in down)
    gated = sum(m.rows * m.count for m in up) >= 2 * sum(m.cols * m.count for m, _ in down)
    return (3 if gated else 4) * inner + sum(2 * hidden * chosen for m, chosen in down if m.count > 1)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model. Raises PlanError for what is none."""
    inner = config.get("text_config", config)
    if not isinstance(inner, Mapping):
        raise PlanError(f"text_config: expected an object, got {inner!r}")
    if inner is not config and not inner.get("torch_dtype") and not inner.get("dtype"):
        return {**inner, "dtype": config.get("dtype") or config.get("torch_dtype")}
    return inner


def number(config: Mapping[str, Any], *names: str, most: int = MOST) -> int:
    """The first of these fields that a config has. Raises PlanError if it has none, or no positive number there."""
    value = optional(config, *names, most=most)
    if value is None:
        raise PlanError(f"expected the config.json of a model that writes text, got one without {names[0]}")
    return value


def optional(config: Mapping[str, Any], *names: str, most: int = MOST) -> int | None:
    """The same; None if it has none."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise PlanError(f"config.json: {name}: expected a positive number up to {most}, got {value!r:.40}")
            return value
    return None


def _dtype(config: Mapping[str, Any]) -> str:
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    known = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
    if named not in known:
        raise PlanError(f"config.json: dtype: expected one of {', '.join(known)}, got {named!r}")
    return known[named]
