"""``bitforbit serve``."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from bitforbit.cli import inference, serve_gpus
from bitforbit.cli.serve_gpus import option
from bitforbit.cli.source import resolve
from bitforbit.cli.supervise import supervise
from bitforbit.errors import (
    MissingDependencyError,
    MixedFilesError,
    NotCompressedError,
    ServerError,
    SourceNotFoundError,
    UsageError,
)

_SERVING = ("pydantic", "fastapi", "uvicorn", "openai", "psutil")
"""What ``transformers serve`` needs besides transformers and torch, and what watches it."""

_COPIED = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
"""Environment variables that vLLM hands to workers on other nodes, besides its own: names with commas between."""

_KV = ("--kv", "--kv-group", "--kv-residual", "--kv-sink")


@dataclass(frozen=True)
class Server:
    """A program that serves a model: arguments for the Python interpreter, and environment variables to be set.

    ``name``: what clients call the model. ``watched``: what its lasting processes' names begin with.
    """

    arguments: Sequence[str]
    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    watched: str = ""


def command(
    context: typer.Context,
    source: inference.Model,
    host: Annotated[str, typer.Option("--host", metavar="H", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, metavar="P", help="Port to listen on.")] = 8000,
    mode: inference.ModeOption = inference.Mode.exact,
) -> int:
    """Answer requests in the style of OpenAI over HTTP, with vLLM or else transformers; weights stay compressed.

    Other options are handed on to the server. vLLM gets as many GPUs as the model needs, or --tensor-parallel-size.

    \b
    bitforbit serve DIR
    bitforbit serve DIR --port 9000 --max-model-len 32768
    bitforbit serve DIR --tensor-parallel-size 8 --served-model-name llama
    curl localhost:8000/v1/completions --json '{"model":"DIR","prompt":"Hello"}'
    """
    refuse(context.args)
    server = choose(resolve(source, silent=False), source, host, port, mode.value, context.args, tell=_say)
    _say(f"starting: {' '.join(['python', *server.arguments])}")
    # Under vLLM a node that only works for another one has --headless, and --uds is another place to listen at.
    if option(context.args, "--headless") is None and option(context.args, "--uds") is None:
        check_port(host, port)
        _say(f"will answer at http://{f'[{host}]' if ':' in host else host}:{port}/v1, model name: {server.name}")
    try:
        return supervise(server.arguments, server.environment, server.watched)
    except ServerError:
        _say("")  # servers that die do not always end their line
        raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def refuse(arguments: Sequence[str]) -> None:
    """Raise UsageError for options of other commands of ours, which a server would misunderstand."""
    for name in _KV:
        if option(arguments, name) is not None:
            raise UsageError(
                f"{name}: servers have caches of their own; bitforbit's quantized one works in run, chat and Python. "
                "vLLM's own is --kv-cache-dtype fp8, which is lossy"
            )


def check_port(host: str, port: int) -> None:
    """Raise UsageError if nobody could listen there: better before the model is loaded than after it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} of {host} is in use; stop what listens there, or choose --port") from None
        raise UsageError(f"expected an address of this machine to listen on, got {host}, port {port}: {e}") from None


def quantization_method(config: Path) -> str | None:
    """``quant_method`` of a config.json, None if it names none."""
    from bitforbit.archive.rewrite import load_object

    quantization = (load_object(config) or {}).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else None


def choose(
    directory: Path,
    name: str,
    host: str,
    port: int,
    mode: str,
    more: Sequence[str] = (),
    is_installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
    gpus: Callable[[], Sequence[int]] = serve_gpus.memories,
    tell: Callable[[str], None] = lambda text: None,
) -> Server:
    """The server for a model directory, which clients call ``name``; ``more``: further options of that server.

    ``gpus``: bytes of each; ``tell`` is told what was decided about them. Raises SourceNotFoundError,
    MissingDependencyError, UsageError for what the servers cannot load, and NotCompressedError for a plain directory
    where only transformers is there. Raises MixedFilesError for a compressed directory with the config of another one.
    """
    from bitforbit.archive.source import df11_config
    from bitforbit.format.spec import MANIFEST_NAME, QUANT_METHOD

    if not (directory / "config.json").is_file():
        raise SourceNotFoundError(f"{directory}: expected a model directory with config.json, got none")
    compressed = (directory / MANIFEST_NAME).is_file()
    if compressed and quantization_method(directory / "config.json") != QUANT_METHOD:
        # Libraries would not ask for our plug-in: transformers would serve random weights.
        raise MixedFilesError(
            f"{directory / 'config.json'}: expected quant_method {QUANT_METHOD!r} in quantization_config, as "
            f"{MANIFEST_NAME} beside it says that the weights are compressed; the file is the original's or another "
            "model's: fetch the compressed one again"
        )
    address = ["--host", host, "--port", str(port)]
    if is_installed("vllm"):
        if df11_config(directory):
            raise UsageError(
                f"{directory}: a DFloat11 model, which vLLM cannot load; decompress it (bitforbit decompress)"
            )
        from bitforbit.integrations.vllm import MODE_VARIABLE

        flags = [] if compressed else ["--quantization", "bitforbit"]
        served = option(more, "--served-model-name")
        names = ["--served-model-name", name] if served is None else []
        added, why = serve_gpus.parallel(directory, mode, more, gpus())
        if why is not None:
            tell(why)
        arguments = ["-m", "vllm.entrypoints.cli.main", "serve", str(directory), *names, *address, *flags, *added]
        copied = [*filter(None, [os.environ.get(_COPIED)]), MODE_VARIABLE]
        environment = {MODE_VARIABLE: mode, _COPIED: ",".join(dict.fromkeys(copied))}
        return Server([*arguments, *more], served or name, environment, watched="VLLM::")
    if not all(map(is_installed, ("torch", "transformers", *_SERVING))):
        raise MissingDependencyError(
            "bitforbit serve needs vLLM, or transformers with its server: pip install vllm, or "
            "pip install 'transformers[serving]' psutil"
        )
    if not compressed and not df11_config(directory):
        raise NotCompressedError(
            f"{directory}: transformers serves compressed models only; bitforbit compress it first"
        )
    if mode != "exact":
        raise UsageError(f"expected mode exact, got {mode}: transformers takes no other from here; install vllm")
    if option(more, "--served-model-name") is not None:
        raise UsageError(f"--served-model-name: transformers has no other name for the model than {directory}")
    # transformers takes what follows an @ for a revision.
    if "@" in str(directory):
        raise UsageError(f"{directory}: transformers serves no path with an @; rename the directory")
    return Server(["-m", "bitforbit.cli.serve_transformers", "serve", str(directory), *address, *more], str(directory))
