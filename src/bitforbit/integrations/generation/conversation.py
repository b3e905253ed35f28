"""A conversation with a model: by the tokenizer's chat template, else as plain turns of a dialogue."""

from __future__ import annotations

from typing import Any

import torch

from bitforbit.integrations.generation.kv import OWN, KvChoice
from bitforbit.integrations.generation.load import LoadedModel
from bitforbit.integrations.generation.text import (
    Generation,
    Settings,
    Write,
    encode_chat,
    encode_prompt,
    generate,
)

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
_STOP = "\nUser:"


class Conversation:
    """Turns so far, and the model that answers. A turn that fails leaves no trace.

    A quantized cache (``kv``) is kept from turn to turn, so that only what is new is read; the model's own is not:
    each answer then has the bits of a prompt that is read at once.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Any,
        settings: Settings,
        system: str | None = None,
        kv: KvChoice = OWN,
    ) -> None:
        self.loaded, self.tokenizer, self.settings, self.kv = loaded, tokenizer, settings, kv
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer knows how conversations are written."""
        return bool(self.tokenizer.chat_template)

    def reset(self) -> None:
        """Forget all turns but the system's text."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._cache: Any = None
        self._cached: list[int] = []

    def ask(self, text: str, write: Write | None = None) -> Generation:
        """The model's answer, streamed to ``write``. Ctrl-C ends it; what came until then stays in the history.

        Raises PromptTooLongError when the conversation does not fit into the model's context any more.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(messages)
        cache = self._cache_for(ids[0].tolist())
        answer = generate(
            self.loaded,
            self.tokenizer,
            ids,
            self.settings,
            write=write,
            stop=None if self.has_template else _STOP,
            interruptible=True,
            cache=cache,
        )
        if cache is not None and answer.stopped != "interrupted":  # that may come between two layers
            self._cache = cache
            self._cached = [*ids[0].tolist(), *answer.token_ids][: cache.get_seq_length()]
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        return answer

    def _cache_for(self, ids: list[int]) -> Any:
        """A cache that holds a beginning of these tokens: the one of the last turn as far as it fits, else a new one.

        It is taken from ``self``, so that a turn that fails does not leave it behind half changed.
        """
        cache, cached = self._cache, self._cached
        self._cache, self._cached = None, []
        if cache is None:
            return self.kv.make(self.loaded.model)
        pairs = zip(cached, ids[:-1], strict=False)  # at least one token must be left to read
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(cached), len(ids) - 1))
        if same < len(cached):
            if any(cache.is_sliding) or any(cache.is_linear):  # these have forgotten what they would need
                return self.kv.make(self.loaded.model)
            cache.crop(same - len(cached))
        return cache

    def _encode(self, messages: list[dict[str, str]]) -> torch.Tensor:
        if self.has_template:
            return encode_chat(self.tokenizer, messages)
        turns = [f"{_NAMES[message['role']]}: {message['content']}" for message in messages]
        return encode_prompt(self.tokenizer, "\n".join([*turns, "Assistant:"]))
