"""The commands that the guide and the examples give for vLLM are ones that it understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ("docs/guide/nodes.md", "docs/guide/serve.md", "docs/guide/vllm.md", "examples/serve_405b.sh")


def commands() -> list[tuple[str, list[str]]]:
    """Every `bitforbit serve` and `vllm serve` in these files: where, and what follows `serve`."""
    found = []
    for name in TEXTS:
        text = re.sub(r"\\\n\s*", "", (ROOT / name).read_text())
        for line in re.findall(r"^\s*(?:exec )?(?:bitforbit|vllm) serve (.*)", text, re.M):
            arguments = shlex.split(line, comments=True)
            ours = [i for i, argument in enumerate(arguments) if argument == "--mode"]
            for i in ours:
                del arguments[i : i + 2]
            found.append((name, [argument.rstrip("\\") for argument in arguments]))
    return found


@pytest.fixture(scope="module")
def parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def test_commands_are_understood(parser: Any) -> None:
    seen = commands()
    assert {name for name, _ in seen} == set(TEXTS)
    for _, arguments in seen:
        parser.parse_args(arguments)


def test_how_the_example_cuts_the_model(parser: Any) -> None:
    one, two = [parser.parse_args(arguments) for name, arguments in commands() if name == TEXTS[-1]]
    assert (one.tensor_parallel_size, one.pipeline_parallel_size) == (8, 1)
    assert (two.tensor_parallel_size, two.pipeline_parallel_size) == (8, 2)
    assert two.distributed_executor_backend == "ray"


def test_the_mode_reaches_workers_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.ray.ray_env import get_env_vars_to_copy

    from bitforbit.cli import serve
    from bitforbit.integrations.vllm import MODE_VARIABLE

    monkeypatch.setenv(serve._COPIED, MODE_VARIABLE)
    assert MODE_VARIABLE in get_env_vars_to_copy()
