"""How many tokens texts have, by a checkpoint's own tokenizer, without what takes seconds to import.

For estimates: ids are made, and words that look like control tokens are counted as these. Where a checkpoint has no
`tokenizer.json`, or one that is refused, nothing is counted.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdd.models.chats import Turns, messages_of, plain_template, system_placed
from sdd.models.control import PROBE, tokenized
from sdd.models.panics import panics_told
from sdd.models.rendering import render_chat
from sdd.models.tokenizers import NAMED, check_tokenizer_files
from sdd.untrusted import read_json, read_text

END = 1
"""Tokens that end an answer."""


class Lengths:
    """Tokens of texts, and of the chat that the checkpoint's template puts around a task."""

    def __init__(self, folder: Path, vocabulary: int | None) -> None:
        check_tokenizer_files(folder, vocabulary)
        from tokenizers import Tokenizer

        with panics_told("panic"):
            self.tokenizer = Tokenizer.from_str(read_text(folder / "tokenizer.json", "tokenizer.json"))
        self.special_tokens_map, template = _special_tokens_and_template(folder)
        begins = tokenized(self.tokenizer.encode, PROBE).tokens[:1] == [self.special_tokens_map.get("bos_token")]
        self.template = template or plain_template(begins)

    def get_chat_template(self) -> Any:
        return self.template

    def of(self, text: str) -> int:
        """Tokens of a text, none added."""
        return len(tokenized(self.tokenizer.encode, text, add_special_tokens=False).ids)

    def asked(self, prompt: str, system_prompt: str | None = None, before: Turns = ()) -> int:
        """Tokens of a chat up to where its answer starts."""
        messages = system_placed(self, messages_of(prompt, system_prompt, before))
        return self.of(render_chat(self, messages, add_generation_prompt=True))

    def answered(self, text: str) -> int:
        """Tokens of an answer with the one that ends its turn."""
        return self.of(text) + END

    def around(self, system_prompt: str | None) -> int:
        """Tokens that the template puts around a task."""
        return self.asked(PROBE, system_prompt) - self.of(PROBE)


def _special_tokens_and_template(folder: Path) -> tuple[Mapping[str, str], Any]:
    """The special tokens that a chat template may name, and the template, if the folder has one."""
    given: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := folder / name).is_file():
            given |= {key: value for key, value in read_json(path, name).items() if value is not None}
    tokens = {name: given[name] for name in NAMED if name in given}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    if (path := folder / "chat_template.jinja").is_file():
        return special, read_text(path, path.name)
    if (path := folder / "chat_template.json").is_file():
        return special, read_json(path, path.name).get("chat_template")
    return special, given.get("chat_template")


@lru_cache(maxsize=8)
def lengths_of(folder: Path, vocabulary: int | None) -> Lengths | None:
    """None where they cannot be told: what is wrong is said where the tokenizer is opened for work."""
    try:
        lengths = Lengths(folder, vocabulary)
        lengths.around(None)
        return lengths
    except Exception:  # tokenizers has no type of its own for what it does not read
        return None
