"""Shapes of the parameters of a model that is never made: transformers builds it without memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MadeModel:
    """The whole config, with its defaults, and the shapes of parameters by name, shared ones once."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def parameter_shapes(config: Path) -> MadeModel | None:
    """Of the language model that transformers makes of a config.json; None if it knows no such model.

    No code of the model's own is run, nor is anybody asked whether it may.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        made = AutoConfig.from_pretrained(str(config), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError, OSError, RuntimeError):
        return None
    return MadeModel(made.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()})
