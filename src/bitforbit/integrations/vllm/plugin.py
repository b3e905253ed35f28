"""What vLLM calls before it does anything else, in every process (entry point group ``vllm.general_plugins``)."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the quantization method ``bitforbit``, and its files. May be called any number of times."""
    from bitforbit.integrations.vllm import config, weights

    config.register()
    weights.install()
