"""The packaged model in every form that ``run``, ``chat`` and ``bench`` take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitforbit
from bitforbit.demo import model_path

PROMPT = "def read_json(path):\n"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_all(root: Path) -> dict[str, Path]:
    """Directories by kind: native, plain, df11, and chat (native with a chat template)."""
    plain = root / "plain"
    bitforbit.decompress(model_path(), plain)
    bitforbit.compress(plain, root / "df11", format="df11")
    shutil.copytree(model_path(), root / "chat")
    edit(root / "chat" / "tokenizer_config.json", chat_template=TEMPLATE)
    return {"native": model_path(), "plain": plain, "df11": root / "df11", "chat": root / "chat"}


def edit(path: Path, **members: object) -> None:
    """Change members of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))
