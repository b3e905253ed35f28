"""``bitforbit run``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bitforbit.cli import inference, options, output


def command(
    source: inference.Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help='What to continue; "-": read it.')],
    max_new_tokens: inference.NewTokens = 128,
    mode: inference.ModeOption = inference.Mode.exact,
    temperature: inference.Temperature = 0.0,
    seed: inference.Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    threads: inference.Threads = None,
    device: inference.Device = "auto",
    runtime: inference.Runtime = "auto",
    kv: inference.Kv = "16",
    kv_group: inference.KvGroup = 32,
    kv_residual: inference.KvResidual = 128,
    kv_sink: inference.KvSink = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The text alone, no figures.")] = False,
    json: options.Json = False,
) -> None:
    """Continue a text with a model whose weights stay compressed in memory.

    The text goes to standard output as it is made, the figures (speed, memory, how products ran) to standard error.
    """
    from bitforbit.integrations import generation

    generation.require("bitforbit run")
    directory = inference.open_model(source, silent=quiet or json)
    text = sys.stdin.read() if prompt == "-" else prompt

    from bitforbit.integrations.generation import load, shares
    from bitforbit.integrations.generation.text import Settings, encode_chat, encode_prompt, generate

    settings = Settings(max_new_tokens, temperature, seed)
    choice = inference.choose_kv(kv, kv_group, kv_residual, kv_sink, note=quiet)
    place = inference.choose_place(device, runtime)
    count = inference.compute_threads(threads)
    tokenizer = load.load_tokenizer(directory)
    ids = encode_chat(tokenizer, [{"role": "user", "content": text}]) if chat else encode_prompt(tokenizer, text)
    loaded = inference.load_model(directory, mode, count, place, silent=quiet or json)
    shares.reset()
    cache = choice.make(loaded.model)
    result = generate(loaded, tokenizer, ids, settings, write=None if json else inference.write, cache=cache)
    ran = shares.collect()
    values = inference.figures(loaded, [result], ran, place, count, choice)
    if json:
        output.print_json({"text": result.text, "token_ids": result.token_ids, "stopped": result.stopped, **values})
        return
    if not result.text.endswith("\n"):
        inference.write("\n")
    if not quiet:
        inference.show_figures(values, ran)
