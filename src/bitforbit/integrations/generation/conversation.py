"""A conversation with a model: by the tokenizer's chat template, else as plain turns of a dialogue."""

from __future__ import annotations

from typing import Any

import torch

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
    """Turns so far, and the model that answers. A turn that fails leaves no trace."""

    def __init__(self, loaded: LoadedModel, tokenizer: Any, settings: Settings, system: str | None = None) -> None:
        self.loaded, self.tokenizer, self.settings = loaded, tokenizer, settings
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

    def ask(self, text: str, write: Write | None = None) -> Generation:
        """The model's answer, streamed to ``write``. Ctrl-C ends it; what came until then stays in the history.

        Raises PromptTooLongError when the conversation does not fit into the model's context any more.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = generate(
            self.loaded,
            self.tokenizer,
            self._encode(messages),
            self.settings,
            write=write,
            stop=None if self.has_template else _STOP,
            interruptible=True,
        )
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        return answer

    def _encode(self, messages: list[dict[str, str]]) -> torch.Tensor:
        if self.has_template:
            return encode_chat(self.tokenizer, messages)
        turns = [f"{_NAMES[message['role']]}: {message['content']}" for message in messages]
        return encode_prompt(self.tokenizer, "\n".join([*turns, "Assistant:"]))
