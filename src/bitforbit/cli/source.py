"""Sources that are local paths, or models on the Hugging Face Hub, which are fetched into its cache."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from bitforbit.errors import MissingDependencyError, SourceNotFoundError

HUB_MODEL = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
"""org/name, with an optional @revision (branch, tag or commit)."""

_MANIFEST = "bitforbit.json"
_WEIGHTS = ".safetensors"
_DUPLICATE = "consolidated"
"""Some models carry their weights a second time, in files of this name."""

_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".md", ".yaml", ".yml", ".vocab", ".bpe")
_OTHER_WEIGHTS_INDEX = (".bin.index.json", ".msgpack.index.json", ".h5.index.json")
_STEMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "README", "USE_POLICY")
_OTHER_FORMATS = ("original", "onnx", "openvino", "coreml", "tf", "flax", "gguf")


def resolve(source: str, *, silent: bool) -> Path:
    """The local path of a source: the path itself, or where the Hub model ``org/name[@revision]`` is cached.

    A path that exists always wins. Says on standard error where the model is cached, unless ``silent``.
    Raises SourceNotFoundError, MissingDependencyError, PickleRefusedError or GgufRefusedError.
    """
    path = Path(source)
    match = HUB_MODEL.fullmatch(source)
    if path.exists() or path.is_symlink() or match is None:
        return path
    cached = _fetch(match["repo"], match["revision"], silent)
    if not silent:
        print(f"{source} is cached in {cached}", file=sys.stderr)
    return cached


def needed(names: Sequence[str]) -> list[str]:
    """The files of a Hub model to fetch: its safetensors weights, configurations, tokenizer, code and licences.

    Of a model that bitforbit compressed, all: each belongs to the original. Weights in other formats are left out.
    """
    if any(name.rpartition("/")[2] == _MANIFEST for name in names):
        return list(names)
    weights = {name for name in names if name.endswith(_WEIGHTS)}
    folders = {
        name.rpartition("/")[0] for name in weights if not name.rpartition("/")[2].startswith(_DUPLICATE)
    }  # those with weights under their usual names
    chosen = []
    for name in names:
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts) or path.parts[0] in _OTHER_FORMATS:
            continue
        if name in weights:
            if not path.name.startswith(_DUPLICATE) or name.rpartition("/")[0] not in folders:
                chosen.append(name)
        elif path.name.startswith(_STEMS) or (name.endswith(_SUFFIXES) and not name.endswith(_OTHER_WEIGHTS_INDEX)):
            chosen.append(name)
    return chosen


class HubUnreachableError(Exception):
    """Nothing is known of the model; what is cached may serve."""


def hub_info(repo: str, revision: str | None) -> Any:
    """What the Hub knows of a model. Asks once. Raises SourceNotFoundError, which says why, or HubUnreachableError."""
    import huggingface_hub
    from huggingface_hub import errors

    network_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library that it uses
    name = f"{repo}@{revision}" if revision else repo
    try:
        return huggingface_hub.HfApi().model_info(repo, revision=revision)
    except errors.GatedRepoError:
        raise SourceNotFoundError(f"{name}: access to it must be granted on the Hub; then: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise SourceNotFoundError(f"{name}: neither a local path nor a public model on the Hub") from None
    except errors.RevisionNotFoundError:
        raise SourceNotFoundError(f"{name}: the model is on the Hub, but has no such revision") from None
    except errors.HFValidationError as e:
        raise SourceNotFoundError(f"{name}: neither a local path nor the name of a model on the Hub ({e})") from None
    except (network_error, OSError) as e:
        raise HubUnreachableError(str(e)) from e


def _fetch(repo: str, revision: str | None, silent: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors, utils
    except ImportError:
        raise MissingDependencyError(
            f"{repo}: no such file or directory; to fetch it from the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    if silent or not sys.stderr.isatty():
        utils.disable_progress_bars()
    network_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library that it uses
    name = f"{repo}@{revision}" if revision else repo
    try:
        info = hub_info(repo, revision)
    except HubUnreachableError as e:
        return from_cache(repo, revision, e)
    names = [file.rfilename for file in info.siblings or ()]
    _check_kind(name, names)
    patterns = [glob.escape(file) for file in needed(names)]
    try:
        # By the name of the revision, which the cache then remembers for when the Hub cannot be reached.
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (network_error, OSError) as e:
        raise SourceNotFoundError(f"{name}: could not be fetched completely ({e}); run again to continue") from e


def _check_kind(name: str, files: Sequence[str]) -> None:
    from bitforbit.archive.source import refuse_kind

    if not any(file.endswith(_WEIGHTS) for file in files):
        refuse_kind(Path(name), files)
        raise SourceNotFoundError(f"{name}: expected a model with .safetensors files, got none")


def from_cache(repo: str, revision: str | None, error: Exception) -> Path:
    """A complete copy in the Hub's cache. Raises SourceNotFoundError, which says why the Hub was of no help."""
    import huggingface_hub

    name = f"{repo}@{revision}" if revision else repo

    # The names of the model's files are not known here, so the choice of needed() is spelled as patterns.
    wanted = [*(f"*{suffix}" for suffix in (_WEIGHTS, *_SUFFIXES)), *(f"{stem}*" for stem in _STEMS)]
    unwanted = [f"{prefix}{_DUPLICATE}*" for prefix in ("", "*/")] + [".*", "*/.*"]
    unwanted += [f"{folder}/*" for folder in _OTHER_FORMATS] + [f"*{suffix}" for suffix in _OTHER_WEIGHTS_INDEX]
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=wanted, ignore_patterns=unwanted
        )
        return Path(folder)
    except OSError:
        raise SourceNotFoundError(
            f"{name}: no such path; the Hub cannot be reached ({error}), and its cache holds no complete copy"
        ) from error
