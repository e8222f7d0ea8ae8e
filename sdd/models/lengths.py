"""How many tokens texts have, by a checkpoint's own tokenizer, without what takes seconds to import.

For estimates: ids are made, and words that look like control tokens are counted as these. Where a checkpoint has no
`tokenizer.json`, or one that is refused, nothing is counted.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdd.models.chats import PLAIN_TEMPLATE
from sdd.models.control import PROBE
from sdd.models.panics import panics_told
from sdd.models.rendering import render_chat
from sdd.models.tokenizers import NAMED, check_tokenizer_files
from sdd.untrusted import read_json, read_text


class Lengths:
    """Tokens of texts, and of the chat that the checkpoint's template puts around a task."""

    def __init__(self, folder: Path, vocabulary: int | None) -> None:
        check_tokenizer_files(folder, vocabulary)
        from tokenizers import Tokenizer

        with panics_told("panic"):
            self.tokenizer = Tokenizer.from_str(read_text(folder / "tokenizer.json", "tokenizer.json"))
        self.template, self.special_tokens_map = _template(folder)

    def get_chat_template(self) -> Any:
        return self.template

    def of(self, text: str) -> int:
        """Tokens of a text, none added."""
        with panics_told():
            return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def around(self, system_prompt: str | None) -> int:
        """Tokens of a chat with an empty task up to where its answer starts."""
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        asked = render_chat(self, [*system, {"role": "user", "content": PROBE}], add_generation_prompt=True)
        return self.of(asked) - self.of(PROBE)


def _template(folder: Path) -> tuple[Any, Mapping[str, str]]:
    """The chat template, the plain one where there is none, and the special tokens that it may name."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, path.name) if path.is_file() else {}
    named = {name: config.get(name) for name in NAMED}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token}
    if (path := folder / "chat_template.jinja").is_file():
        return read_text(path, path.name), special
    if (path := folder / "chat_template.json").is_file():
        return read_json(path, path.name).get("chat_template"), special
    return config.get("chat_template") or PLAIN_TEMPLATE, special


@lru_cache(maxsize=8)
def lengths_of(folder: Path, vocabulary: int | None) -> Lengths | None:
    """None where they cannot be told: what is wrong is said where the tokenizer is opened for work."""
    try:
        lengths = Lengths(folder, vocabulary)
        lengths.around(None)
        return lengths
    except Exception:  # tokenizers has no type of its own for what it does not read
        return None
