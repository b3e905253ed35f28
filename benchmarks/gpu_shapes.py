"""The linears of three models, each with how often it occurs in a layer: from the models' configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Matrices [rows[i], cols] that share their input."""

    model: str
    kind: str
    rows: tuple[int, ...]
    cols: int

    @property
    def name(self) -> str:
        """For tables and logs."""
        return f"{self.model} {self.kind} {' + '.join(map(str, self.rows))} x {self.cols}"

    @property
    def weights(self) -> int:
        """Of all matrices."""
        return sum(self.rows) * self.cols


@dataclass(frozen=True)
class Model:
    """What follows from a configuration of Llama's or Qwen's kind."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def layer(self) -> tuple[Shape, ...]:
        """A layer's linears as a decode step runs them: those with the same input together."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Shape(self.name, "q+k+v", (q, kv, kv), self.hidden),
            Shape(self.name, "o", (self.hidden,), q),
            Shape(self.name, "gate+up", (self.intermediate,) * 2, self.hidden),
            Shape(self.name, "down", (self.hidden,), self.intermediate),
        )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """A layer's, the LM head, and the matrices of the groups one by one."""
        singles = (
            Shape(self.name, "q", (self.heads * self.head_dim,), self.hidden),
            Shape(self.name, "k, v", (self.kv_heads * self.head_dim,), self.hidden),
            Shape(self.name, "gate, up", (self.intermediate,), self.hidden),
        )
        known = {(shape.rows, shape.cols) for shape in self.layer}
        head = Shape(self.name, "LM head", (self.vocabulary,), self.hidden)
        return (*self.layer, head, *(shape for shape in singles if (shape.rows, shape.cols) not in known))


LLAMA_8B = Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256)
QWEN_32B = Model("Qwen3-32B", 5120, 25600, 64, 8, 128, 151936)
LLAMA_70B = Model("Llama-3.1-70B", 8192, 28672, 64, 8, 128, 128256)
MODELS = (LLAMA_8B, QWEN_32B, LLAMA_70B)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
