"""Shapes of compressed matrices: DF11 files hold their sizes only.

In order: what the caller states; the hidden size, from the unit's norms or the config, and the side of the matrix
that has it; the bias, which has one element per row. Whatever else is known must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bitforbit.errors import Df11ShapeError

_ROWS_BY_HIDDEN = frozenset(  # in_features is the hidden size
    [
        *(
            "q_proj",
            "k_proj",
            "v_proj",
            "qkv_proj",
            "gate_proj",
            "up_proj",
            "gate_up_proj",
            "fc1",
            "wi",
            "wi_0",
            "wi_1",
        ),
        *("q_a_proj", "kv_a_proj_with_mqa", "query_key_value", "c_attn", "c_fc", "dense_h_to_4h"),
        *("embed_tokens", "lm_head"),
    ]
)
_COLUMNS_BY_HIDDEN = frozenset(  # out_features is the hidden size
    ["o_proj", "out_proj", "down_proj", "fc2", "wo", "c_proj", "dense_4h_to_h"]
)
_ROWS_BY_CONFIG = {"q_b_proj": "q_lora_rank", "kv_b_proj": "kv_lora_rank"}
_HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd", "dim")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm", "norm1", "norm2", "ln_1", "ln_2")
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass(frozen=True)
class ShapeSource:
    """What is known: shapes of all tensors that are stored plainly, the config, shapes that the caller stated."""

    plain: Mapping[str, tuple[int, ...]]
    config: Mapping[str, object]
    stated: Mapping[str, Sequence[int]]

    def shapes(self, unit: str, names: Sequence[str], sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Shapes [out_features, in_features] of a unit's matrices, given their names and numbers of weights.

        Raises Df11ShapeError where nothing tells, or where two sources differ.
        """
        shapes = [self._shape(unit, name, size) for name, size in zip(names, sizes, strict=True)]
        self._check_siblings(dict(zip(names, shapes, strict=True)))
        return shapes

    def _shape(self, unit: str, name: str, size: int) -> tuple[int, int]:
        stated = self.stated.get(name)
        if stated is not None:
            if len(stated) != 2 or min(stated) < 1 or stated[0] * stated[1] != size:
                raise Df11ShapeError(f"{name}: the stated shape {list(stated)} does not hold {size} weights")
            return int(stated[0]), int(stated[1])
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        bias = self.plain.get(f"{module}.bias")
        rows = bias[0] if bias is not None and len(bias) == 1 else None
        columns: int | None = None
        if leaf in _ROWS_BY_CONFIG:
            columns = next(_integers(self.config, (_ROWS_BY_CONFIG[leaf],)), None)
        elif leaf in _ROWS_BY_HIDDEN:
            columns = self._hidden(unit, name)
        elif leaf in _COLUMNS_BY_HIDDEN:
            hidden = self._hidden(unit, name)
            if rows is not None and hidden is not None and rows != hidden:
                raise _differ(name, f"a bias of {rows}", f"a hidden size of {hidden}")
            rows = rows if hidden is None else hidden
        if rows is None and columns is None:
            raise Df11ShapeError(
                f"{name}: cannot derive the shape of these {size} weights: no norm or bias beside it and no "
                "hidden_size in config.json tell; " + _state(name)
            )
        known = rows or columns or 0
        if known < 1 or size % known or (rows and columns and rows * columns != size):
            raise _differ(name, f"{size} weights", f"rows {rows}, columns {columns} (hidden size, bias)")
        shape = (rows or size // known, columns or size // known)
        vocab = set(_integers(self.config, ("vocab_size",)))
        if leaf in ("embed_tokens", "lm_head") and vocab and shape[0] not in vocab:
            raise _differ(name, f"{shape[0]} rows", f"a vocab_size of {min(vocab)}")
        return shape

    def _hidden(self, unit: str, name: str) -> int | None:
        configured = set(_integers(self.config, _HIDDEN_KEYS))
        hidden = self._norm_size(unit)
        if hidden is None:
            main = [self.config, self.config.get("text_config"), self.config.get("llm_config")]
            tops = [int_of(part, key) for part in main if isinstance(part, Mapping) for key in _HIDDEN_KEYS]
            return next((size for size in tops if size is not None), None)
        if configured and hidden not in configured:
            raise _differ(name, f"a norm of {hidden}", f"a hidden size of {min(configured)} in config.json")
        return hidden

    def _norm_size(self, unit: str) -> int | None:
        own = {self._vector(f"{unit}.{norm}.weight") for norm in _LAYER_NORMS} - {None}
        if own:
            return min(size for size in own if size is not None) if len(own) == 1 else None
        parents = [unit.rpartition(".")[0], "model", "transformer", "model.language_model", "language_model.model", ""]
        for parent in parents:
            for norm in _FINAL_NORMS:
                size = self._vector(f"{parent}.{norm}.weight".removeprefix("."))
                if size is not None:
                    return size
        return None

    def _vector(self, name: str) -> int | None:
        shape = self.plain.get(name, ())
        return shape[0] if len(shape) == 1 else None

    def _check_siblings(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, gate in shapes.items():
            parent, found, _ = name.rpartition("gate_proj.weight")
            up, down = shapes.get(f"{parent}up_proj.weight", gate), shapes.get(f"{parent}down_proj.weight", gate[::-1])
            if found and not (gate == up == down[::-1]):
                raise _differ(name, f"{list(gate)}", f"up {list(up)} and down {list(down)}")


def int_of(config: Mapping[str, object], key: str) -> int | None:
    """A positive integer of a config."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def _integers(config: object, keys: Sequence[str], depth: int = 0) -> Iterator[int]:
    """Positive integers under any of the keys, in the config and the configs inside it."""
    if not isinstance(config, Mapping) or depth > 4:
        return
    for key in keys:
        value = int_of(config, key)
        if value is not None:
            yield value
    for part in config.values():
        yield from _integers(part, keys, depth + 1)


def _state(name: str) -> str:
    example = f'{{"{name}": [4096, 1024]}}'
    return f"state it as (out_features, in_features) with --shapes FILE, or shapes= in Python, for example {example}"


def _differ(name: str, one: str, other: str) -> Df11ShapeError:
    return Df11ShapeError(f"{name}: two sources of its shape disagree: {one}, but {other}; " + _state(name))
