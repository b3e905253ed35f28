"""``bitforbit info``."""

from __future__ import annotations

from typing import Any

from bitforbit import __version__
from bitforbit.cli import options, output

_PACKAGES = {
    "required": ("numpy", "ml_dtypes", "xxhash", "typer", "rich"),
    "optional": (
        "huggingface_hub",
        "matplotlib",
        "torch",
        "transformers",
        "accelerate",
        "diffusers",
        "peft",
        "vllm",
        "cuda-bindings",
        "nvidia-cuda-nvrtc",
    ),
}
_VARIABLES = ("BITFORBIT_ISA", "BITFORBIT_THREADS", "BITFORBIT_CACHE", "BITFORBIT_PARANOID", "BITFORBIT_VLLM_MODE")


def command(json: options.Json = False) -> None:
    """Show the version, the CPU's instruction sets, GPUs, threads, codecs, packages and environment variables."""
    facts = collect()
    if json:
        output.print_json(facts)
        return
    output.print_line(f"bitforbit {facts['version']}, Python {facts['python']}, {facts['platform']}")
    output.print_line()
    output.print_table(
        ["instruction set", "", ""],
        [
            [isa["name"], "supported" if isa["supported"] else "not on this CPU", "active" if isa["active"] else ""]
            for isa in facts["instruction_sets"]
        ],
        left=3,
    )
    output.print_line()
    output.print_facts("GPUs", _gpu_rows(facts["gpu"]))
    output.print_line()
    output.print_facts("settings", [("threads", str(facts["threads"])), ("codecs", ", ".join(facts["codecs"]))])
    output.print_line()
    output.print_facts("packages", [(n, v or "not installed") for n, v in facts["packages"].items()])
    output.print_line()
    output.print_facts("environment", [(n, v or "not set") for n, v in facts["environment"].items()])


def collect() -> dict[str, Any]:
    """Everything that ``info`` shows. Raises UnknownIsaError or UsageError if an environment variable is wrong."""
    import os
    import platform

    from bitforbit import cpu
    from bitforbit.codecs import registry

    active = cpu.active()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "instruction_sets": [
            {"name": name, "supported": supported, "active": name == active}
            for name, supported in cpu.implementations().items()
        ],
        "gpu": _gpu(),
        "threads": cpu.default_threads(),
        "codecs": [*registry.names(), "raw"],
        "packages": {name: _version(name) for names in _PACKAGES.values() for name in names},
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
    }


def _gpu() -> dict[str, Any]:
    from dataclasses import asdict

    from bitforbit.cuda import device

    return asdict(device.status())


def _gpu_rows(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(f"cuda:{i}", name) for i, name in enumerate(gpu["gpus"])]
    rows.append(("driver", f"CUDA {gpu['driver']}" if gpu["driver"] else "not available"))
    rows.append(("kernel compiler", f"NVRTC {gpu['nvrtc']}" if gpu["nvrtc"] else "not available"))
    return rows + ([("not usable", gpu["problem"])] if gpu["problem"] else [])


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
