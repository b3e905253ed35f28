"""What holds text back until it is known not to be the stop text, and the settings of generation."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from bitforbit.errors import UsageError
from bitforbit.integrations.generation.text import Settings, _Hold


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["one", " two"], "one two"),
        (["one\nUser:", " two"], "one"),
        (["one\nU", "ser", ":", "two"], "one"),
        (["one\nU", "nder"], "one\nUnder"),
        (["one\n", "\nUser: x"], "one\n"),
        (["one\nUse"], "one\nUse"),
        (["\nUser:"], ""),
        ([""], ""),
    ],
)
def test_stop_text_is_never_shown(pieces: list[str], shown: str) -> None:
    hold = _Hold("\nUser:")
    assert "".join([hold.feed(piece, last=False) for piece in pieces] + [hold.feed("", last=True)]) == shown
    free = _Hold(None)
    assert [free.feed(piece, last=False) for piece in pieces] == pieces


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, *({"temperature": t} for t in (-1.0, float("nan"), 1e999))])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]
