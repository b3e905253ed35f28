"""Where ``plan`` reads a model from: a path, the Hub (config and headers only), or transformers for rare families."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitforbit.cli.source import HUB_MODEL, HubUnreachableError, from_cache, hub_info
from bitforbit.errors import MissingDependencyError, PlanError, SourceNotFoundError

if TYPE_CHECKING:
    from bitforbit.planner import Shape


def read(model: str) -> Shape:
    """The model of a directory, a config.json or a Hub model ``org/name[@revision]``.

    A path that exists always wins. Raises PlanError, SourceNotFoundError, MissingDependencyError or FormatError.
    """
    from bitforbit.planner import read_shape

    path = Path(model)
    match = HUB_MODEL.fullmatch(model)
    if match is not None and not path.exists() and not path.is_symlink():
        return _from_hub(match["repo"], match["revision"])
    try:
        return read_shape(path)
    except PlanError as e:
        config = path / "config.json" if path.is_dir() else path
        return _from_transformers(config, e)


def _from_hub(repo: str, revision: str | None) -> Shape:
    """From its config.json and the headers of its files, of which nothing else is fetched."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingDependencyError(
            f"{repo}: no such file or directory; to read it from the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    from bitforbit.planner.checkpoint import Tensor, from_tensors, read_shape

    network_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library that it uses
    try:
        hub_info(repo, revision)
        config = Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=revision))
    except HubUnreachableError as e:
        return _from_cache(repo, revision, e)
    except (network_error, OSError, ValueError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise SourceNotFoundError(f"{repo}: the model is on the Hub, but its config.json is not ({reason})") from None
    fields = _object(config)
    if "quantization_config" not in fields and "dfloat11_config" not in fields:
        try:
            found: Any = huggingface_hub.HfApi().get_safetensors_metadata(repo, revision=revision)
            files = found.files_metadata.values()
            tensors = [
                Tensor(name, tuple(info.shape), info.dtype) for file in files for name, info in file.tensors.items()
            ]
            return from_tensors(fields, tensors)
        except (network_error, OSError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError):
            pass  # config.json is enough for the families that are known
    try:
        return read_shape(config)
    except PlanError as e:
        return _from_transformers(config, e)


def _from_cache(repo: str, revision: str | None, error: Exception) -> Shape:
    """Of what was fetched before: all of it, or the config alone. Raises SourceNotFoundError."""
    import huggingface_hub

    from bitforbit.planner import read_shape

    try:
        return read_shape(from_cache(repo, revision, error))
    except SourceNotFoundError:
        config = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(config, str):
            raise
    try:
        return read_shape(Path(config))
    except PlanError as e:
        return _from_transformers(Path(config), e)


def _object(config: Path) -> dict[str, Any]:
    from bitforbit.archive.rewrite import load_object

    return load_object(config) or {}


def _from_transformers(config: Path, error: PlanError) -> Shape:
    """What transformers makes of a config whose family is not known here; the error if it makes nothing."""
    from bitforbit.planner.checkpoint import Tensor, from_tensors
    from bitforbit.planner.families import known

    fields = _object(config) if config.is_file() else {}
    if not fields or known(fields):
        raise error
    from bitforbit.integrations.generation import missing

    if missing():
        raise error
    from bitforbit.integrations.meta import parameter_shapes

    made = parameter_shapes(config)
    if made is None:
        raise error
    from dataclasses import replace

    dtype = {"float16": "F16", "float32": "F32"}.get(str(fields.get("dtype") or fields.get("torch_dtype")), "BF16")
    shape = from_tensors(made.config, [Tensor(name, size, dtype) for name, size in made.shapes.items()])
    return replace(shape, sizes_from="config.json, by transformers")
