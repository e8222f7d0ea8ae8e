r"""A stranger's tokenizer files, checked before the tokenizers library reads them.

That library is compiled: what it allocates, loops in or panics over cannot be stopped from here. So what could make it
do so is measured before: files are regular and of bounded size, ids lie within the vocabulary, replacements let a
text grow to `GROWTH` times its length at most, and a regular expression has none of the shapes that backtracking takes
exponential or high polynomial time for (a repeated group that itself repeats or chooses, back references, many
repetitions in one alternative). All published pre-tokenizers that are known here pass. Knows nothing of chats.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.models.panics import panics_told
from sdd.untrusted import SMALL_FILE, check_regular, parse_json, printable, read_json, read_text

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
OTHERS = ("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

LONGEST_PATTERN = 4000
"""Characters of a regular expression; those of published tokenizers have up to some 1,000 (lists of code points)."""
REPEATS = 3
"""Unbounded repetitions in one alternative; the published patterns have up to two."""
MAYBES, FEW = 6, 4
"""Parts of one alternative that may be there or not, or up to `FEW` times: as `\\p{N}{1,3}`."""
GROWTH = 64
"""How many times longer a text may get in one part; sentencepiece's space takes 3 bytes for 1."""
LONGEST_TOKEN = 1024
"""Characters of a token that is added, prepended or put in for another."""
MOST_PARTS = 100
"""Steps of one part of the pipeline, all of which every text goes through; published tokenizers have up to some ten."""
WRAPPED = 64
"""Tokens that a post-processor may put around a text."""


def open_tokenizer(folder: Path, vocabulary: int | None) -> Any:
    """The folder's tokenizer as transformers opens it, its files checked first."""
    check_tokenizer_files(folder, vocabulary if type(vocabulary) is int else None)
    from transformers import AutoTokenizer

    try:
        with panics_told("panic"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.decode(tokenizer("a b 1!\n")["input_ids"])  # what fails on any text fails here
    except Exception as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])[:300]
        raise UserError(f"the tokenizer does not open ({reason})") from None
    return tokenizer


def check_tokenizer_files(folder: Path, vocabulary: int | None) -> None:
    """Refuse tokenizer files that the libraries should not be given; `vocabulary` is the model's number of tokens."""
    for name in (*FILES, *OTHERS):
        path = folder / name
        if path.is_symlink() or path.exists():
            status = check_regular(path, name)
            if status.st_size > SMALL_FILE:
                raise UserError(f"{name}: {status.st_size:,} bytes, more than the {SMALL_FILE:,} that are read")
            _check(path, status.st_size, status.st_mtime_ns, vocabulary)


@lru_cache(maxsize=64)
def _check(path: Path, size: int, modified: int, vocabulary: int | None) -> None:
    name = path.name
    if name in FILES:
        content = read_json(path, name)
        checks = {
            "tokenizer.json": _check_tokenizer,
            "tokenizer_config.json": _check_config,
            "special_tokens_map.json": _check_tokens,
        }
        checks.get(name, _check_ids)(content, name, vocabulary)
    elif name == "chat_template.json":
        parse_json(read_text(path, name), name)
    elif name != "tokenizer.model":
        read_text(path, name)


def _check_config(config: Mapping[str, Any], name: str, vocabulary: int | None) -> None:
    longest = config.get("model_max_length")
    if longest is not None and (not isinstance(longest, int | float) or isinstance(longest, bool) or not longest >= 1):
        raise UserError(f"{name}: model_max_length is no number above 0")
    kind = config.get("tokenizer_class")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{name}: tokenizer_class is not a name")
    if config.get("fast_tokenizer_files") is not None:
        raise UserError(f"{name}: fast_tokenizer_files names other files, which are not read")
    _check_tokens(config, name, vocabulary)
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        return
    if not isinstance(decoder, Mapping):
        raise UserError(f"{name}: added_tokens_decoder is not a table of tokens")
    for id, token in decoder.items():
        if not id.isascii() or not id.isdecimal() or len(id) > 9 or not isinstance(token, Mapping):
            raise UserError(f"{name}: added_tokens_decoder has no token for {printable(id[:50])}")
        _check_added(int(id), token.get("content"), bool(token.get("special")), name, vocabulary)


def _check_tokens(config: Mapping[str, Any], name: str, vocabulary: int | None) -> None:
    """Special tokens are texts, or objects with one."""
    for key in NAMED:
        token = config.get(key)
        content = token.get("content") if isinstance(token, Mapping) else token
        if token is not None and (not isinstance(content, str) or len(content) > LONGEST_TOKEN):
            raise UserError(f"{name}: {key} is not a token's text")


def _check_ids(tokens: Mapping[str, Any], name: str, vocabulary: int | None) -> None:
    """A table from tokens to their ids."""
    if not all(type(id) is int and 0 <= id < 1 << 31 for id in tokens.values()):
        raise UserError(f"{name}: the id of a token is no number of a token")


def _check_added(id: Any, content: Any, special: bool, name: str, vocabulary: int | None) -> None:
    if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < 1 << 31:
        raise UserError(f"{name}: the id of an added token is no number of a token")
    if not isinstance(content, str) or not content or len(content) > LONGEST_TOKEN:
        raise UserError(f"{name}: the added token {id} has no text, or one of more than {LONGEST_TOKEN} characters")
    if vocabulary is not None and id >= vocabulary and not special:
        raise UserError(f"{name}: the added token {id} is beyond the model's {vocabulary} tokens")


def _check_tokenizer(spec: Mapping[str, Any], name: str, vocabulary: int | None) -> None:
    model, added = spec.get("model"), spec.get("added_tokens") or []
    if not isinstance(model, Mapping) or not isinstance(added, list):
        raise UserError(f"{name}: has no model, or no list of added tokens")
    tokens = model.get("vocab")
    if isinstance(tokens, Mapping):
        ids = list(tokens.values())
        if not all(type(id) is int and 0 <= id < 1 << 31 for id in ids):
            raise UserError(f"{name}: the id of a token of the vocabulary is no number of a token")
        last = max(ids, default=0)
    elif isinstance(tokens, list):
        last = len(tokens) - 1
    else:
        raise UserError(f"{name}: the model has no vocabulary")
    for token in added:
        if not isinstance(token, Mapping):
            raise UserError(f"{name}: an added token is not an object")
        _check_added(token.get("id"), token.get("content"), bool(token.get("special")), name, vocabulary)
    if model.get("type") == "WordPiece" and not 0 <= _number(model.get("max_input_chars_per_word")) <= LONGEST_TOKEN:
        raise UserError(f"{name}: max_input_chars_per_word is no number up to {LONGEST_TOKEN}")
    if vocabulary is not None and last >= vocabulary:
        special = {token["id"] for token in added if token.get("special")}
        named = tokens.items() if isinstance(tokens, Mapping) else ()
        if not named or any(id >= vocabulary and id not in special for _, id in named):
            raise UserError(f"{name}: the token {last} is beyond the model's {vocabulary} tokens")
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        _check_part(spec.get(part), f"{name}: {part}")


def _number(value: Any) -> int:
    return value if type(value) is int else 0 if value is None else -1


def _check_part(part: Any, what: str) -> None:
    """Patterns, replacements and wrapped tokens of one part of the pipeline."""
    growth, wrapped, depth, parts = 1.0, 0, 0, 0
    for node, level in _nodes(part):
        parts += "type" in node
        growth *= 2 if node.get("type") == "ByteLevel" else 1  # one character for each byte, of two bytes itself
        depth = max(depth, level)
        pattern, content = node.get("pattern"), node.get("content", node.get("prepend"))
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
        if isinstance(pattern, Mapping) and "Regex" in pattern:
            check_pattern(pattern["Regex"], what)
        if isinstance(content, str) and (pattern is not None or "prepend" in node):
            if len(content) > LONGEST_TOKEN:
                raise UserError(f"{what}: puts in a text of more than {LONGEST_TOKEN} characters")
            growth *= max(1.0, len(content.encode("utf-8", "replace")) / max(1, len(replaced or "")))
        for side in ("single", "pair"):
            pieces = node[side] if isinstance(node.get(side), list) else []
            wrapped += len(pieces)
            growth *= max(1, sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces))
        for entry in (
            (node.get("special_tokens") or {}).values() if isinstance(node.get("special_tokens"), dict) else ()
        ):
            wrapped += len(entry["ids"]) if isinstance(entry, dict) and isinstance(entry.get("ids"), list) else 0
    if parts > MOST_PARTS:
        raise UserError(f"{what}: has more than {MOST_PARTS} parts")
    if growth > GROWTH:
        raise UserError(f"{what}: lets a text grow to more than {GROWTH} times its length")
    if wrapped > WRAPPED:
        raise UserError(f"{what}: puts more than {WRAPPED} tokens around a text")


def _nodes(value: Any, level: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    if level > 50:
        raise UserError("tokenizer.json: nested too deeply")
    if isinstance(value, dict):
        yield value, level
        for member in value.values():
            yield from _nodes(member, level + 1)
    elif isinstance(value, list):
        for member in value:
            yield from _nodes(member, level + 1)


_TOKEN = re.compile(
    r"\\[pP]\{[^{}]*\}|\\[xu]\{[0-9a-fA-F]*\}|\\(?P<back>[1-9kg])|\\."
    r"|(?P<open>\((?:\?(?:[:=!>]|<[=!]|(?P<flags>[A-Za-z-]+):?|<\w+>))?)"
    r"|(?P<close>\))|(?P<choice>\|)|(?P<repeat>[*+]|\{\d*,\d*\}|\{\d+\})[?+]?|(?P<maybe>\?)[?+]?|(?P<class>\[)|.",
    re.S,
)


def check_pattern(pattern: Any, what: str) -> None:
    """Refuse a regular expression that some text could make take more than polynomial time of low degree."""
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise UserError(f"{what}: a pattern that is no text, or longer than {LONGEST_PATTERN} characters")
    if reason := _costly(pattern):
        raise UserError(
            f"{what}: a regular expression with {reason}, which can take any time: {printable(pattern)[:80]}"
        )


def _costly(pattern: str) -> str | None:
    """What is wrong with a pattern; None if nothing. Each open group keeps whether it repeats and chooses inside."""
    groups: list[dict[str, Any]] = [{"repeats": 0, "most": 0, "loose": False, "maybe": 0}]
    closed: dict[str, Any] | None = None
    at = 0
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        assert match is not None, "the last alternative takes any character"
        at = match.end()
        group = groups[-1]
        if match["back"]:
            return "a back reference"
        if "x" in (match["flags"] or ""):
            return "free spacing"
        if match["class"]:
            at = _after_class(pattern, match.start())
            closed = None
        elif match["open"]:
            groups.append({"repeats": 0, "most": 0, "loose": False, "maybe": 0})
            closed = None
            if len(groups) > 20:
                return "groups in groups"
        elif match["close"]:
            if len(groups) == 1:
                return "a bracket that nothing opens"
            closed = groups.pop()
            closed["most"] = max(closed["most"], closed["repeats"])
            closed["loose"] = closed["loose"] or closed["most"] > 0 or closed["maybe"] > 0
            groups[-1]["repeats"] += closed["most"]
            groups[-1]["maybe"] += closed["maybe"]
        elif match["choice"]:
            group["most"], group["repeats"], group["loose"] = max(group["most"], group["repeats"]), 0, True
            group["maybe"] = 0
            closed = None
        elif match["repeat"]:
            if closed is not None and closed["loose"]:
                return "a repeated group that repeats, chooses or skips"
            least, most = _bounds(match["repeat"])
            if most is None or most > FEW or least > 1000:
                group["repeats"] += 1 if most is None or least != most else 0
            elif least != most:
                group["maybe"] += 1
            if max(least, most or 0) > 1000:
                return "a repetition of more than 1,000 times"
            closed = {"loose": least != most}
        elif match["maybe"]:
            group["maybe"] += 1
            closed = {"loose": True}
        else:
            closed = None
        if max(group["repeats"], groups[-1]["repeats"]) > REPEATS or max(group["maybe"], groups[-1]["maybe"]) > MAYBES:
            return "too many repetitions in one alternative"
    return None


def _bounds(repeat: str) -> tuple[int, int | None]:
    """(least, most) times of a repetition; None without bound."""
    if repeat in "*+":
        return int(repeat == "+"), None
    least, comma, most = repeat.strip("{}").partition(",")
    return int(least or 0), (int(most) if most else None) if comma else int(least)


def _after_class(pattern: str, start: int) -> int:
    """Where a class of characters ends, classes inside it included."""
    at, depth = start + 1, 1
    if pattern[at : at + 1] == "^":
        at += 1
    if pattern[at : at + 1] == "]":
        at += 1
    while at < len(pattern) and depth:
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
        at += 1
    return at
