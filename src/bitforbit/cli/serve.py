"""``bitforbit serve``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from bitforbit.cli import inference
from bitforbit.cli.source import resolve
from bitforbit.errors import MissingDependencyError, NotCompressedError, SourceNotFoundError, UsageError

_SERVING = ("pydantic", "fastapi", "uvicorn", "openai")
"""What ``transformers serve`` needs besides transformers and torch."""


@dataclass(frozen=True)
class Server:
    """A program that serves a model: arguments for the Python interpreter, and environment variables to be set."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def command(
    context: typer.Context,
    source: inference.Model,
    host: Annotated[str, typer.Option("--host", metavar="H", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, metavar="P", help="Port to listen on.")] = 8000,
    mode: inference.ModeOption = inference.Mode.exact,
) -> None:
    """Answer requests in the style of OpenAI over HTTP, with vLLM or else transformers; weights stay compressed.

    Other options are handed on, such as --tensor-parallel-size 2 for vLLM.
    """
    server = choose(resolve(source, silent=False), source, host, port, mode.value, context.args)
    print(f"starting: {' '.join(['python', *server.arguments])}", file=sys.stderr, flush=True)
    # In the place of this process, so that signals reach it.
    os.execve(sys.executable, [sys.executable, *server.arguments], {**os.environ, **server.environment})


def choose(
    directory: Path,
    name: str,
    host: str,
    port: int,
    mode: str,
    more: Sequence[str] = (),
    is_installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
) -> Server:
    """The server for a model directory, which clients call ``name``; ``more``: further options of that server.

    Raises SourceNotFoundError, MissingDependencyError, UsageError for what the servers cannot load, and
    NotCompressedError for a plain directory where only transformers is there.
    """
    from bitforbit.archive.source import df11_config
    from bitforbit.format.spec import MANIFEST_NAME

    if not (directory / "config.json").is_file():
        raise SourceNotFoundError(f"{directory}: expected a model directory with config.json, got none")
    compressed = (directory / MANIFEST_NAME).is_file()
    address = ["--host", host, "--port", str(port)]
    if is_installed("vllm"):
        if df11_config(directory):
            raise UsageError(
                f"{directory}: a DFloat11 model, which vLLM cannot load; decompress it (bitforbit decompress)"
            )
        from bitforbit.integrations.vllm import MODE_VARIABLE

        flags = [] if compressed else ["--quantization", "bitforbit"]
        served = ["--served-model-name", name]
        arguments = ["-m", "vllm.entrypoints.cli.main", "serve", str(directory), *served, *address, *flags, *more]
        return Server(arguments, {MODE_VARIABLE: mode})
    if not all(map(is_installed, ("torch", "transformers", *_SERVING))):
        raise MissingDependencyError(
            "bitforbit serve needs vLLM, or transformers with its server: pip install vllm, or "
            "pip install 'transformers[serving]'"
        )
    if not compressed and not df11_config(directory):
        raise NotCompressedError(
            f"{directory}: transformers serves compressed models only; bitforbit compress it first"
        )
    if mode != "exact":
        raise UsageError(f"expected mode exact, got {mode}: transformers takes no other from here; install vllm")
    return Server(["-m", "transformers.cli.transformers", "serve", str(directory), *address, *more])
