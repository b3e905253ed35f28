"""A prompt in, text out as it is made, with the times of its tokens."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GenerationConfig, TextStreamer

from bitforbit.errors import PromptTooLongError, UsageError
from bitforbit.integrations.generation.load import LoadedModel
from bitforbit.integrations.transformers.kv import CacheFigures, figures

Stopped = Literal["end", "length", "interrupted"]
Write = Callable[[str], object]


@dataclass(frozen=True)
class Settings:
    """How to choose tokens: greedily at temperature 0, else sampled with a seed. At most ``max_new_tokens`` of them."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature: expected 0 (greedy) or a positive number, got {self.temperature}")

    def config(self, model: Any) -> GenerationConfig:
        """The model's own generation settings, with these in place of its way of choosing."""
        config = copy.deepcopy(model.generation_config)
        config.max_new_tokens, config.max_length = self.max_new_tokens, None
        config.do_sample, config.num_beams = self.temperature > 0, 1
        if self.temperature > 0:
            config.temperature = self.temperature
        else:
            config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
        if config.pad_token_id is None:
            eos = config.eos_token_id
            config.pad_token_id = eos[0] if isinstance(eos, list) else eos
        return config


@dataclass(frozen=True)
class Generation:
    """Text that a model wrote. ``first_token_seconds`` includes reading the prompt; rates are None if not measurable.

    ``tokens_per_second`` counts the tokens after the first, so the prompt's length does not matter.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    first_token_seconds: float | None
    seconds: float
    tokens_per_second: float | None
    stopped: Stopped
    cache: CacheFigures | None = None
    """Memory of the key-value cache afterwards; None if it is not known."""


def generate(
    loaded: LoadedModel,
    tokenizer: Any,
    prompt: torch.Tensor,
    settings: Settings,
    *,
    write: Write | None = None,
    stop: str | None = None,
    interruptible: bool = False,
    cache: Any = None,
) -> Generation:
    """Continue a prompt of token ids ``[1, tokens]`` and hand pieces of text to ``write`` as they are final.

    ``cache`` may hold the prompt's first tokens already; by default the model makes its own.

    Ends before the text ``stop``. With ``interruptible``, Ctrl-C ends it, and what was written so far is the result.
    Raises PromptTooLongError if prompt and answer do not fit into the model's context.
    """
    count = int(prompt.shape[1])
    settings = _fitting(loaded, count, settings)
    stream = _Stream(tokenizer, write, stop)
    torch.manual_seed(settings.seed)
    prompt = prompt.to(loaded.model.device)
    options: dict[str, Any] = {} if stop is None else {"stop_strings": [stop], "tokenizer": tokenizer}
    config = settings.config(loaded.model)
    config.return_dict_in_generate = True
    if cache is not None:
        options["past_key_values"], config.cache_implementation = cache, None
    stopped: Stopped = "end"
    begin = time.perf_counter()
    used = cache
    try:
        out = loaded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            streamer=stream,
            **options,
        )
        used = out.get("past_key_values")
    except KeyboardInterrupt:
        if not interruptible:
            raise
        stopped = "interrupted"
        stream.end()
    seconds = time.perf_counter() - begin
    times, ids = stream.times, stream.token_ids
    if stopped == "end" and len(ids) >= settings.max_new_tokens and not stream.ended_by(_end_tokens(loaded.model)):
        stopped = "length"
    later = times[-1] - times[0] if len(times) > 1 else 0.0
    return Generation(
        text=stream.text,
        token_ids=ids,
        prompt_tokens=count,
        first_token_seconds=times[0] - begin if times else None,
        seconds=seconds,
        tokens_per_second=(len(times) - 1) / later if later > 0 else None,
        stopped=stopped,
        cache=figures(used) if hasattr(used, "layers") else None,
    )


def encode_prompt(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids ``[1, tokens]`` of a text, with the special tokens the tokenizer adds. Raises UsageError if none."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    if not ids.numel():
        if tokenizer.bos_token_id is None:
            raise UsageError("prompt: expected some text, got none")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    return ids


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids ``[1, tokens]`` of a conversation by the tokenizer's template, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise UsageError("expected a tokenizer with a chat template, got none in this model; leave out --chat")
    from jinja2 import TemplateError

    try:
        coded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as e:
        raise UsageError(f"the model's chat template refuses this conversation: {e}") from e
    ids: torch.Tensor = coded["input_ids"]
    return ids


def _fitting(loaded: LoadedModel, count: int, settings: Settings) -> Settings:
    limit = loaded.directory.context_tokens
    if limit is None or count + settings.max_new_tokens <= limit:
        return settings
    if count >= limit:
        raise PromptTooLongError(
            f"expected a prompt of fewer than {limit} tokens, the context of this model, got {count}; shorten it"
        )
    return Settings(limit - count, settings.temperature, settings.seed)


def _end_tokens(model: Any) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set(eos) if isinstance(eos, list) else set() if eos is None else {eos}


@dataclass
class _Hold:
    """Passes text on but for the stop text and what might become it."""

    stop: str | None
    kept: str = ""
    reached: bool = False

    def feed(self, piece: str, *, last: bool) -> str:
        if self.stop is None:
            return piece
        text, self.kept = self.kept + piece, ""
        at = text.find(self.stop)
        if self.reached or at >= 0:
            text, self.reached = "" if self.reached else text[:at], True
        elif not last:
            length = next((n for n in range(len(self.stop) - 1, 0, -1) if text.endswith(self.stop[:n])), 0)
            text, self.kept = text[: len(text) - length], text[len(text) - length :]
        return text


@dataclass
class _Log:
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


class _Stream(TextStreamer):
    """Notes each token and when it came; passes final text on."""

    def __init__(self, tokenizer: Any, write: Write | None, stop: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._log, self._write, self._hold = _Log(), write, _Hold(stop)

    @property
    def times(self) -> list[float]:
        return self._log.times

    @property
    def token_ids(self) -> list[int]:
        return self._log.token_ids

    @property
    def text(self) -> str:
        return "".join(self._log.pieces)

    def ended_by(self, tokens: set[int]) -> bool:
        return self._hold.reached or bool(self.token_ids and self.token_ids[-1] in tokens)

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._log.times.append(time.perf_counter())
            self._log.token_ids.extend(int(token) for token in value.flatten())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        piece = self._hold.feed(text, last=stream_end)
        if piece:
            self._log.pieces.append(piece)
            if self._write is not None:
                self._write(piece)
