"""Tiny models and pipelines, each as a plain and a compressed directory, made once per session."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

import bitforbit

collect_ignore_glob = [] if importlib.util.find_spec("diffusers") else ["test_*.py"]

Directories = Callable[[str], tuple[Path, Path]]
"""Name of a model or pipeline -> its plain and its compressed directory."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """A model of the zoo in BF16; ``"sd"``, a Stable Diffusion in FP32; ``"fluxes"``, a FLUX pipeline in BF16."""
    import torch

    from integrations.diffusers import zoo

    known: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            plain = root / "plain"
            if name == "sd":
                zoo.stable_diffusion(root).save_pretrained(plain)
            elif name == "fluxes":
                zoo.flux_pipeline(root).to(torch.bfloat16).save_pretrained(plain)
            else:
                zoo.make(name).save_pretrained(plain)
            bitforbit.compress(plain, root / "compressed", threads=1)
            known[name] = plain, root / "compressed"
        return known[name]

    return get
