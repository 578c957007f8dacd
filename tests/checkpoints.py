"""Real checkpoints with a bad habit, made from the embedded text model."""

import json
import shutil
from pathlib import Path

from helpers import TEXT


def hostile(folder: Path, text: str) -> str:
    """One whose first token, <think> by training, is written as `text`."""
    shutil.copytree(TEXT, folder)

    def rename(tokenizer):
        (think,) = (t for t in tokenizer["added_tokens"] if t["content"] == "<think>")
        think["content"] = text

    _edit(folder / "tokenizer.json", rename)
    return str(folder)


def endless(folder: Path) -> str:
    """One that never ends: what it was trained to write at the end is not what ends a turn."""
    shutil.copytree(TEXT, folder)
    token = "<|vision_end|>"
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("<|im_end|>", token), "utf-8")
    tokens = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    (index,) = (t["id"] for t in tokens if t["content"] == token)
    _edit(folder / "tokenizer_config.json", lambda config: config.update(eos_token=token))
    for name in ("config.json", "generation_config.json"):
        _edit(folder / name, lambda config: config.update(eos_token_id=index))
    return str(folder)


def _edit(file: Path, change) -> None:
    values = json.loads(file.read_text("utf-8"))
    change(values)
    file.write_text(json.dumps(values), "utf-8")
