"""What a model directory is: ours, DFloat11 or plain, and whether it holds a model that writes text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitforbit.archive.rewrite import load_object
from bitforbit.archive.source import refuse_kind, scan
from bitforbit.errors import NoGenerationHeadError, SourceNotFoundError, UsageError
from bitforbit.format.spec import QUANT_METHOD, SHARD_SUFFIX

Kind = Literal["bitforbit", "dfloat11", "plain"]


@dataclass(frozen=True)
class ModelDirectory:
    """A directory with ``config.json`` and safetensors files, and how its weights are stored."""

    path: Path
    kind: Kind
    config: Mapping[str, Any]

    @property
    def architectures(self) -> list[str]:
        """Class names in the config, the first being the one that wrote the weights."""
        names = self.config.get("architectures")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def context_tokens(self) -> int | None:
        """How many tokens prompt and answer may have together, if the config says."""
        for config in (self.config, self.config.get("text_config")):
            value = config.get("max_position_embeddings") if isinstance(config, dict) else None
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return scan(self.path).total_bytes

    def warm(self) -> None:
        """Read every file once, so that the operating system has it in memory."""
        buffer = bytearray(1 << 24)
        for file in scan(self.path).files:
            with file.location.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


def open_directory(path: Path) -> ModelDirectory:
    """Look at a directory; no weights are read.

    Raises SourceNotFoundError, UsageError, PickleRefusedError, GgufRefusedError or a FormatError.
    """
    if not path.exists():
        raise SourceNotFoundError(f"{path}: no such directory")
    if not path.is_dir():
        raise UsageError(f"{path}: expected a model directory with config.json, got a file; name its directory")
    location = path / "config.json"
    if not location.is_file():
        raise SourceNotFoundError(f"{path}: expected a model directory with config.json, found none in it")
    names = [file.path for file in scan(path).files]
    if not any(name.endswith(SHARD_SUFFIX) for name in names):
        refuse_kind(path, names)
        raise SourceNotFoundError(f"{path}: expected a model with .safetensors files, got none")
    config = load_object(location)
    if config is None:
        raise UsageError(f"{location}: expected a JSON object, got something else; download the model again")
    return ModelDirectory(path, _kind(path, config), config)


def _kind(path: Path, config: Mapping[str, Any]) -> Kind:
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
        if method == QUANT_METHOD:
            return "bitforbit"
        raise UsageError(
            f"{path}: expected a model in BF16, FP16 or FP32, or one compressed by bitforbit or DFloat11, got one "
            f"that is quantized already ({method}); run it with transformers"
        )
    return "dfloat11" if isinstance(config.get("dfloat11_config"), dict) else "plain"


def auto_class(directory: ModelDirectory) -> Any:
    """The transformers class that loads the model for text generation. Raises NoGenerationHeadError."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    names = directory.architectures
    if not names or any(name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names):
        return AutoModelForCausalLM
    if any(name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() for name in names):
        return AutoModelForImageTextToText
    raise NoGenerationHeadError(
        f"{directory.path}: expected a causal language model (such as LlamaForCausalLM), got {', '.join(names)}, which "
        "does not continue text; load it with transformers' from_pretrained instead"
    )
