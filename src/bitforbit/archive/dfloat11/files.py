"""The files of a model directory that are not weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from bitforbit.archive.source import refuse_kind, scan
from bitforbit.errors import SourceNotFoundError, UsageError

CONFIG_NAME = "config.json"
CONFIG_KEY = "dfloat11_config"
DIFFUSERS_STEM = "diffusion_pytorch_model"

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


def require_directory(path: Path) -> None:
    """Raise SourceNotFoundError unless ``path`` is a directory."""
    if not path.is_dir():
        raise SourceNotFoundError(f"{path}: expected a model directory, got {'a file' if path.exists() else 'nothing'}")


def refuse_without_safetensors(directory: Path) -> None:
    """Raise the error that says why a directory without safetensors files cannot be read."""
    refuse_kind(directory, [path.name for path in sorted(directory.iterdir())])
    raise SourceNotFoundError(f"{directory}: expected a directory with .safetensors files, got none")


def load_config(directory: Path) -> dict[str, object]:
    """``config.json`` of a directory, empty if there is none. Raises UsageError if it is no JSON object."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: expected JSON, got {e}; download it again") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a JSON object, got {type(value).__name__}; download it again")
    return value


def write_config(directory: Path, config: Mapping[str, object]) -> None:
    """Write ``config.json`` in its usual form."""
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def weights_stem(directory: Path) -> str:
    """Name of the main weights file, without suffix: that of diffusers if the directory has it, or ``model``."""
    return DIFFUSERS_STEM if any(directory.glob(f"{DIFFUSERS_STEM}*.safetensors")) else "model"


def copy_other_files(src: Path, dst: Path) -> None:
    """Copy everything but the weights and ``config.json`` of the top directory; sub-directories as they are."""
    for file in scan(src).files:
        if "/" in file.path or not (file.path == CONFIG_NAME or file.path.endswith(_WEIGHT_SUFFIXES)):
            target = dst / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.location, target)
