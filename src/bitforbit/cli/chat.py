"""``bitforbit chat``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from bitforbit.cli import inference, options, output
from bitforbit.errors import PromptTooLongError

if TYPE_CHECKING:
    from bitforbit.integrations.generation.conversation import Conversation
    from bitforbit.integrations.generation.text import Generation

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves; Ctrl-C stops an answer"
_PROMPT = "> "


def command(
    source: inference.Model,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
    ] = None,
    max_new_tokens: inference.NewTokens = 512,
    mode: inference.ModeOption = inference.Mode.exact,
    temperature: inference.Temperature = 0.0,
    seed: inference.Seed = 0,
    threads: inference.Threads = None,
    device: inference.Device = "auto",
    runtime: inference.Runtime = "auto",
    kv: inference.Kv = "16",
    kv_group: inference.KvGroup = 32,
    kv_residual: inference.KvResidual = 128,
    kv_sink: inference.KvSink = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The answers alone, no figures.")] = False,
    json: options.Json = False,
) -> None:
    """Talk with a model whose weights stay compressed in memory: a line is a turn; /reset, /exit.

    Uses the tokenizer's chat template if it has one, else plain "User:" and "Assistant:" turns.
    """
    from bitforbit.integrations import generation

    generation.require("bitforbit chat")
    directory = inference.open_model(source, silent=quiet or json)

    from bitforbit.integrations.generation import load, shares
    from bitforbit.integrations.generation.conversation import Conversation
    from bitforbit.integrations.generation.text import Settings

    settings = Settings(max_new_tokens, temperature, seed)
    choice = inference.choose_kv(kv, kv_group, kv_residual, kv_sink, note=quiet)
    place = inference.choose_place(device, runtime)
    count = inference.compute_threads(threads)
    tokenizer = load.load_tokenizer(directory)
    loaded = inference.load_model(directory, mode, count, place, silent=quiet or json)
    conversation = Conversation(loaded, tokenizer, settings, system, choice)
    shares.reset()
    answers = _talk(conversation, silent=quiet or json, as_json=json)
    ran = shares.collect()
    values = inference.figures(loaded, answers, ran, place, count, choice)
    if json:
        turns = [{"text": answer.text, "stopped": answer.stopped} for answer in answers]
        output.print_json({"answers": turns, **values})
    elif answers and not quiet:
        inference.show_figures(values, ran)


def _talk(conversation: Conversation, *, silent: bool, as_json: bool) -> list[Generation]:
    """Read lines and answer until the end; the answers that were given."""
    terminal = sys.stdin.isatty() and not as_json
    if terminal:
        import readline  # noqa: F401 - gives input() a history and editing

        if not silent:
            template = "" if conversation.has_template else "; this model has no chat template: plain turns"
            output.print_line(_HELP + template)
    answers: list[Generation] = []
    while (line := _read(terminal)) is not None:
        text = line.strip()
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            conversation.reset()
            _note("(forgotten)", silent)
        elif text.startswith("/"):
            _note(f"({text.split()[0]}: no such command; {_HELP})", silent)
        elif text:
            answer = _answer(conversation, text, as_json)
            answers += [] if answer is None else [answer]
    return answers


def _answer(conversation: Conversation, text: str, as_json: bool) -> Generation | None:
    try:
        answer = conversation.ask(text, None if as_json else inference.write)
    except PromptTooLongError:
        if not conversation.messages or as_json:
            raise
        _note("(the conversation fills the model's context: /reset begins a new one)", False)
        return None
    if not as_json:
        inference.write("" if answer.text.endswith("\n") else "\n")
        if answer.stopped == "interrupted":
            _note("(stopped)", False)
        elif answer.stopped == "length":
            _note("(cut off: --max-new-tokens or the context's end)", False)
    return answer


def _read(terminal: bool) -> str | None:
    """The next line; None at the end of input or after two Ctrl-C in a row."""
    if not terminal:
        return sys.stdin.readline() or None
    for last in (False, True):
        try:
            return input(_PROMPT)
        except EOFError:
            inference.write("\n")
            return None
        except KeyboardInterrupt:
            inference.write("\n" if last else "\n(once more, Ctrl-D or /exit leaves)\n")
    return None


def _note(text: str, silent: bool) -> None:
    if not silent:
        print(text, file=sys.stderr, flush=True)
