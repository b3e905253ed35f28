"""Small models of blocks, and their parameters in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import bitforbit
from bitforbit.offload import FileRange, file_ranges

WIDTH = 64


class Block(nn.Module):
    """Norm, two linears side by side, one behind, a stack of matrices, and a buffer."""

    def __init__(self, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.q_proj = nn.Linear(width, width, bias=False, dtype=dtype)
        self.k_proj = nn.Linear(width, width, dtype=dtype)
        self.out = nn.Linear(width, width, bias=False, dtype=dtype)
        self.register_buffer("scale", torch.tensor(0.5, dtype=dtype))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.norm(x)
        return x + self.out(self.q_proj(y) * self.k_proj(y)) * self.scale


class Model(nn.Module):
    """Blocks one after the other, of which every second one may be wider inside."""

    def __init__(self, count: int = 5, dtype: torch.dtype = torch.bfloat16, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dtype) for _ in range(count))
        self.order = list(range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in self.order:
            x = self.blocks[number](x)
        return x

    def named(self) -> dict[str, nn.Module]:
        """The blocks, as they are to be streamed."""
        return {f"blocks.{number}": block for number, block in enumerate(self.blocks)}


def model(count: int = 5, dtype: torch.dtype = torch.bfloat16, seed: int = 0, width: int = WIDTH) -> Model:
    """A frozen model whose blocks all differ."""
    torch.manual_seed(seed)
    made = Model(count, dtype, width).requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return made


def compressed(plain: nn.Module, mode: str = "exact") -> Any:
    """A compressed copy."""
    import copy

    return bitforbit.compress_model(copy.deepcopy(plain), mode=mode, threads=1)


def to_files(made: nn.Module, directory: Path, files: int = 1) -> dict[str, FileRange]:
    """Write a model's parameters, block by block, and take their memory from it. Returns where they are."""
    state, paths = made.state_dict(), []
    for number in range(files):
        paths.append(directory / f"part-{number}.safetensors")
        names = [name for name in state if int(name.split(".")[1]) % files == number]
        save_file({name: state[name].contiguous().clone() for name in names}, paths[-1])
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return file_ranges(paths)


def inputs(tokens: int = 3, dtype: torch.dtype = torch.bfloat16, width: int = WIDTH, seed: int = 1) -> torch.Tensor:
    """Tokens."""
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
