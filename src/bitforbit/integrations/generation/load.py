"""Models and tokenizers from directories of every kind, in one of three modes of computing."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers

from bitforbit.errors import BitforbitError, ModelLoadError, NoGenerationHeadError, NoTokenizerError
from bitforbit.integrations.generation.directory import ModelDirectory, auto_class
from bitforbit.integrations.generation.place import CPU, Place

Mode = Literal["exact", "fused", "bf16"]
"""exact and fused keep the weights compressed; bf16 is the ordinary model, made of the stock classes."""


@dataclass
class LoadedModel:
    """A model ready to generate; ``seconds`` is how long that took, without imports."""

    directory: ModelDirectory
    model: Any
    mode: Mode
    seconds: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers, tied ones counted once."""
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(self.model.config.get_text_config().vocab_size)


def quiet_transformers() -> None:
    """No progress bars and warnings of transformers, unless TRANSFORMERS_VERBOSITY asks for them."""
    import os

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def set_threads(threads: int | None) -> int:
    """Let torch compute with that many threads (None: leave its own choice) and return how many it uses."""
    if threads is not None:
        torch.set_num_threads(threads)
    return int(torch.get_num_threads())


def import_model(directory: ModelDirectory, mode: Mode) -> None:
    """Import what loading needs, so that neither its time nor the memory before it depends on that."""
    for name in directory.architectures:
        getattr(transformers, name, None)
    if mode != "bf16" or directory.kind != "plain":
        import bitforbit.integrations.transformers
        import bitforbit.ops  # noqa: F401


def load(directory: ModelDirectory, mode: Mode, *, threads: int | None = None, place: Place = CPU) -> LoadedModel:
    """Load a model for text generation, to where it is to run.

    In modes ``exact`` and ``fused`` a plain or DFloat11 model is compressed tensor by tensor as it loads. In mode
    ``bf16`` a compressed one is decoded in memory. ``threads`` is for that coding only.
    Raises NoGenerationHeadError, ModelLoadError, GpuUnavailableError, or a FormatError if files are damaged.
    """
    quiet_transformers()
    factory = auto_class(directory)
    import_model(directory, mode)
    stored_compressed = directory.kind != "plain"
    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= place.options
    if mode != "bf16" or stored_compressed:
        from bitforbit import BitforbitConfig

        del options["ignore_mismatched_sizes"]  # refused there, with their names
        computing = "exact" if mode == "bf16" else mode
        options["quantization_config"] = BitforbitConfig(mode=computing, threads=threads, **place.config)
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # Our settings for a directory that is compressed already: they are meant to be merged with its own.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model, info = factory.from_pretrained(str(directory.path), **options)
            model = place.settle(model)
    except BitforbitError:
        raise
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as e:
        raise ModelLoadError(f"{directory.path}: expected a model that transformers can load, got: {e}") from e
    _check_complete(directory, info)
    if not model.can_generate():
        raise NoGenerationHeadError(
            f"{directory.path}: expected a model that continues text, got {type(model).__name__}, which does not"
        )
    if mode == "bf16" and stored_compressed:
        from bitforbit import decompress_model

        stored_plain = [*model.parameters(), *model.buffers()]
        model = decompress_model(model)
        _let_go_of_files(model, stored_plain)
    return LoadedModel(directory, model.eval(), mode, time.perf_counter() - begin)


def _let_go_of_files(model: Any, loaded: list[torch.Tensor]) -> None:
    """Copy what is left of the loaded tensors: one view of a mapped file keeps all of it in memory."""
    ids = {id(tensor) for tensor in loaded}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in ids and tensor.is_cpu:
            tensor.data = tensor.detach().clone()


def _check_complete(directory: ModelDirectory, info: dict[str, Any]) -> None:
    """transformers fills what it does not find with random numbers; that is no model."""
    absent = sorted(info.get("missing_keys") or ())
    other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys") or ())
    for names, what in ((absent, "are not in its files"), (other, "have other shapes in its files")):
        if names:
            raise ModelLoadError(
                f"{directory.path}: {len(names)} tensors that the model of config.json needs {what}, among them "
                f"{', '.join(names[:3])}; download or compress it again"
            )


def load_tokenizer(directory: ModelDirectory) -> Any:
    """The directory's tokenizer. Raises NoTokenizerError."""
    quiet_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory.path))
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as e:
        first = str(e).strip().partition("\n")[0]
        raise NoTokenizerError(
            f"{directory.path}: expected a tokenizer (tokenizer.json), got none that loads ({first}); "
            "copy the tokenizer's files there"
        ) from e
    return tokenizer
