"""Control tokens inside text: only the chat template's own begin and end turns; those in anyone's words are words.

A tokenizer turns `<|im_end|>` into the control token wherever it stands, in a row of a dataset too. Text in which that
would happen (`masked`) has the places written in private characters, one for every UTF-16 unit, until it is tokenized:
by a copy of the tokenizer whose control tokens have other names, so that the template's own are put in by these names
and the words in their own are no tokens at all. Everything else of the copy is the tokenizer's own, and text without
such places never meets it. What counts: tokens declared special, and those with which the template frames turns.
Knows nothing of datasets or models.
"""

import json
import re
import secrets
from typing import Any
from weakref import WeakKeyDictionary, proxy

from sdd.errors import UserError
from sdd.models.panics import panics_told
from sdd.models.rendering import render_chat
from sdd.untrusted import printable

PROBE = "0123456789"
_PRIVATE = 0x100000
"""Plane 16: private characters that no font or corpus is known to use; here they stand for UTF-16 units."""
_MASK = re.compile("[\U00100000-\U0010ffff]+")
_TAG = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.S)
"""What an added token looks like that is no word and no white space: `[INST]`, `<start_of_turn>`."""


class OwnText(str):
    """A text with control tokens that are meant: it was written in this project, and comes from no file."""

    __slots__ = ()


def _mask(text: str) -> str:
    units = memoryview(text.encode("utf-16-le")).cast("H")
    return "".join(chr(_PRIVATE + unit) for unit in units)


def is_masked(text: str) -> bool:
    return _MASK.search(text) is not None


def unmasked(text: str) -> str:
    """The text in its own words."""

    def words(match: re.Match[str]) -> str:
        units = b"".join((ord(c) - _PRIVATE).to_bytes(2, "little") for c in match[0])
        return units.decode("utf-16-le", "replace")

    return _MASK.sub(words, text)


class Control:
    """What a tokenizer's control tokens are, and how text is tokenized in which only some of them are meant.

    `ending` is the text after an answer up to and including the token that ends the turn, and that token: the
    tokenizer's end-of-sequence token where the template ends a turn with no control token at all.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = proxy(tokenizer)
        self.added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        turns = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
        tail = render_chat(tokenizer, turns[:2]).rsplit(PROBE, 1)[-1]
        special = {*tokenizer.all_special_tokens, *self.added.values()}
        ends = [(tail.index(token), -len(token), token) for token in special if token and token in tail]
        eos = str(tokenizer.eos_token)
        at, _, token = min(ends) if ends else (0, 0, eos)
        self.ending = (tail[: at + len(token)] if ends else eos, token)
        self.ids = self._control_ids(turns)
        self._names: dict[int, str] = {}
        self._copy: Any = None

    def _control_ids(self, turns: list[dict[str, str]]) -> frozenset[int]:
        tokenizer, ids = self.tokenizer, {self.tokenizer.convert_tokens_to_ids(self.ending[1])}
        ids |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        try:
            framed = render_chat(tokenizer, turns)
        except UserError:  # some want no more than one turn
            framed = render_chat(tokenizer, turns[:2])
        ids |= {id for id, content in self.added.items() if _TAG.fullmatch(content) and content in framed}
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        ids |= {*tokenizer.all_special_ids, *named} - {None}
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in (self.ending_id, *named[:2]):
            ids.discard(tokenizer.unk_token_id)  # any character that the vocabulary lacks
        return frozenset(ids)

    @property
    def ending_id(self) -> int:
        id: int = self.tokenizer.convert_tokens_to_ids(self.ending[1])
        return id

    def masked(self, text: str) -> str:
        """The text; with what would become a control token, and private characters of its own, masked if any is."""
        if isinstance(text, OwnText):
            return text
        text = _MASK.sub(lambda match: _mask(match[0]), text)
        places = self._places(text)
        parts, last = [], 0
        for _, start, end in places:
            parts += [text[last:start], _mask(text[start:end])]
            last = end
        return "".join([*parts, text[last:]])

    def _places(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) of the control tokens that the tokenizer itself sees in the text."""
        tokens = tokenized(self.tokenizer, text, add_special_tokens=False, verbose=False)
        if self.ids.isdisjoint(tokens["input_ids"]):
            return []
        if not tokens.encodings:
            raise UserError("control tokens inside a text; this tokenizer has no file tokenizer.json to tell them by")
        encoding = tokens.encodings[0]
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [(id, start, end) for id, (start, end) in pairs if id in self.ids]

    def encode(self, text: str, add_special_tokens: bool, at_most: int | None = None) -> list[int]:
        """Token ids of a text: what is masked is words, what is not is as the tokenizer has it.

        `at_most` cuts as the tokenizer's own truncation does.
        """
        if not is_masked(text):
            options = {} if at_most is None else {"truncation": True, "max_length": at_most}
            plain: list[int] = tokenized(self.tokenizer, text, add_special_tokens=add_special_tokens, **options)[
                "input_ids"
            ]
            return plain
        with panics_told():
            return self._encode_masked(text, add_special_tokens, at_most)

    def _encode_masked(self, text: str, add_special_tokens: bool, at_most: int | None) -> list[int]:
        places = self._places(text)
        copy = self._renamed()
        parts, last = [], 0
        for id, start, end in places:
            parts += [unmasked(text[last:start]), self._names[id]]
            last = end
        parts.append(unmasked(text[last:]))
        bare: list[int] = copy.encode("".join(parts), add_special_tokens=False).ids
        if [id for id in bare if id in self.ids] != [id for id, _, _ in places]:
            raise UserError("control tokens inside a text that this tokenizer does not tell from a template's own")
        if at_most is not None:
            copy.enable_truncation(at_most, direction=self.tokenizer.truncation_side)
        ids: list[int] = copy.encode("".join(parts), add_special_tokens=add_special_tokens).ids
        copy.no_truncation()
        return ids

    def _renamed(self) -> Any:
        """The tokenizer with every control token under a name that nobody knows."""
        if self._copy is not None:
            return self._copy
        from tokenizers import Tokenizer

        nonce = secrets.token_hex(8)
        contents = {id: self.tokenizer.convert_ids_to_tokens(id) for id in self.ids}
        self._names = {id: f"\ue000{nonce}\ue001{id}\ue002" for id in self.ids}
        names = {contents[id]: name for id, name in self._names.items()}
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spec |= {"truncation": None, "padding": None}
        for token in spec["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "single_word": False}
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [list(pair) for pair in pairs if not names.keys() & {"".join(pair), *pair}]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        copy = Tokenizer.from_str(json.dumps(spec))
        wrong = [id for id, name in self._names.items() if copy.token_to_id(name) != id]
        if wrong:
            raise UserError(f"control tokens inside a text, and the tokenizer keeps no place for token {wrong[0]}")
        self._copy = copy
        return copy


def tokenized(tokenizer: Any, text: str, **options: Any) -> Any:
    """The tokenizer's answer; what its library panics or raises over is a fault of its files, or of the text."""
    try:
        with panics_told():
            return tokenizer(text, **options)
    except UserError:
        raise
    except Exception as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])[:200]
        raise UserError(f"the tokenizer fails on a text ({reason})") from None


_known: WeakKeyDictionary[Any, tuple[tuple[Any, ...], Control]] = WeakKeyDictionary()


def control_of(tokenizer: Any) -> Control:
    """The tokenizer's control tokens, found once for its template and special tokens."""
    state = (tokenizer.chat_template, dict(tokenizer.special_tokens_map), len(tokenizer))
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        known = _known[tokenizer] = (state, Control(tokenizer))
    return known[1]
