"""Tokenizer files of strangers: one line each, before the compiled library reads what it could hang or die of."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Canaries
from launching import run

from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint
from sdd.models.panics import panics_told
from sdd.models.tokenizers import check_pattern, open_tokenizer

Change = Callable[[Any], Any]


def split(pattern: Any) -> Change:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda spec: spec | {"pre_tokenizer": part}


def replaced(content: str, times: int, found: str = "a") -> Change:
    one = {"type": "Replace", "pattern": {"String": found}, "content": content}
    return lambda spec: spec | {"normalizer": {"type": "Sequence", "normalizers": [one] * times}}


def added(**values: Any) -> Change:
    token = {"id": 5, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return lambda spec: spec | {"added_tokens": [*spec["added_tokens"], token | {"special": False} | values]}


def vocabulary(**tokens: Any) -> Change:
    return lambda spec: spec | {"model": spec["model"] | {"vocab": spec["model"]["vocab"] | tokens}}


def model(**values: Any) -> Change:
    return lambda spec: spec | {"model": spec["model"] | values}


def part(name: str, value: Any) -> Change:
    return lambda spec: spec | {name: value}


def nested(depth: int) -> Any:
    value: Any = {"type": "NFC"}
    for _ in range(depth):
        value = {"type": "Sequence", "normalizers": [value]}
    return value


PREPENDED = {"type": "Prepend", "prepend": "x" * 99}
TOKENIZER: dict[str, Change | str] = {
    "garbage": "\x00\x01 not json",
    "nothing": "",
    "a list": "[]",
    "deep": "[" * 300_000,
    "a number": "7",
    "no model": "{}",
    "a model of another type": part("model", {"type": "Nothing", "vocab": {}}),
    "a model that is a list": part("model", []),
    "no vocabulary": part("model", {"type": "BPE", "merges": []}),
    "a vocabulary of text ids": vocabulary(x="7"),
    "a negative id": vocabulary(x=-1),
    "a huge id": vocabulary(x=2**40),
    "an id of a float": vocabulary(x=1e300),
    "an id beyond the model": vocabulary(x=40_000),
    "merges of nothing": model(merges=["zz qq"]),
    "merges that are numbers": model(merges=[1, 2]),
    "an added token beyond the model": added(id=99_999),
    "an added token with a huge id": added(id=2**33),
    "an added token without id": added(id=None),
    "an added token that is true": added(id=True),
    "an added token without text": added(content=""),
    "an added token of numbers": added(content=7),
    "an added token of a megabyte": added(content="x" * (1 << 20)),
    "added tokens that are an object": part("added_tokens", {"a": 1}),
    "added tokens that are texts": part("added_tokens", ["a"]),
    "a repeated group": split("(a+)+$"),
    "a repeated choice": split("(a|aa)+$"),
    "a repeated skip": split("(a?){64}a{64}"),
    "a repeated repeat": split("(?:a{1,9}){9,}b"),
    "skips in a row": split("a?" * 40 + "a" * 40),
    "repeats in a row": split(r"\s*\s*\s*\s*\s*x"),
    "ranges in a row": split("a{0,16}" * 20 + "b"),
    "a back reference": split(r"(a*)\1\1b"),
    "a named reference": split(r"(?<n>a|b\g<n>c)*d"),
    "a repeated group in free spacing": split("(?x: ( a + ) + )b"),
    "free spacing from here": split("(?x)(a #\n+) +b"),
    "free spacing among others": split("(?imx-s:(a +) +b)"),
    "a lazy repeated group": split("(?:a+?)+?b"),
    "an atomic repeated group": split("((?>a*)b?)*c"),
    "groups in groups": split("(" * 30 + "a" + ")" * 30),
    "a long pattern": split("a" * 5000),
    "a large repetition": split("(?:abc){99999}"),
    "a pattern that is a list": split(["a"]),
    "a pattern that does not compile": split("(a"),
    "a pattern in the normalizer": part("normalizer", {"type": "Replace", "pattern": {"Regex": "(.*)*"}}),
    "a pattern in the decoder": part("decoder", {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}),
    "doubling": replaced("aa", 40),
    "growing from nothing": replaced("x" * 100, 1, ""),
    "a long replacement": replaced("x" * 9999, 1),
    "prepending": part("normalizer", {"type": "Prepend", "prepend": "x" * 5000}),
    "prepending often": part("normalizer", {"type": "Sequence", "normalizers": [PREPENDED] * 9}),
    "deep normalizers": part("normalizer", nested(400)),
    "normalizers without an end": part("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 9_999}),
    "splits without an end": part(
        "pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 9_999}
    ),
    "pieces of no length": part("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    "bytes of bytes": part("normalizer", {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}),
    "bytes of bytes in the split": part(
        "pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}] * 40}
    ),
    "a text in a text": part("post_processor", {"type": "Sequence", "processors": [{"type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 9, "pair": [], "special_tokens": {}}] * 6}),
    "a decoder that takes too much": part("decoder", {"type": "Strip", "content": "a", "start": 1, "stop": 10**12}),
    "an unknown normalizer": part("normalizer", {"type": "Run", "code": "RAN"}),
    "a normalizer that is a number": part("normalizer", 7),
    "a broken character map": part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a wrapped text": part("post_processor", {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "x", "type_id": 0}}] * 999]}),
    "a wrapping token of many ids": part("post_processor", {"type": "TemplateProcessing", "single": [], "pair": [],
        "special_tokens": {"x": {"id": "x", "ids": [1] * 9999, "tokens": ["x"] * 9999}}}),
    "a word of any length": part("model", {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a",
        "continuing_subword_prefix": "##", "max_input_chars_per_word": 10**12}),
}  # fmt: skip
CONFIG: dict[str, dict[str, Any] | str] = {
    "garbage": "{",
    "a list": "[1]",
    "deep": '{"a":' * 300_000,
    "a tokenizer class that is a list": {"tokenizer_class": ["a"]},
    "an end that is a list": {"eos_token": ["<|end|>"]},
    "an end that is a number": {"eos_token": 2},
    "an end without content": {"eos_token": {"lstrip": True}},
    "an end of odd content": {"eos_token": {"content": ["x"]}},
    "an end of a megabyte": {"eos_token": "x" * (1 << 20)},
    "no end": {"eos_token": None},
    "an end beyond the model": {"eos_token": "<never seen>"},
    "a length of text": {"model_max_length": "many"},
    "a negative length": {"model_max_length": -5},
    "a length of nothing": {"model_max_length": 0},
    "a length that is no number": {"model_max_length": float("nan")},
    "a length of true": {"model_max_length": True},
    "other files": {"fast_tokenizer_files": ["../../tokenizer.9.json"]},
    "added tokens as a list": {"added_tokens_decoder": [1]},
    "added tokens without number": {"added_tokens_decoder": {"a\x1b[2J": {"content": "x"}}},
    "added tokens of huge numbers": {"added_tokens_decoder": {"9" * 4000: {"content": "x"}}},
    "added tokens beyond the model": {"added_tokens_decoder": {"99999": {"content": "<y>", "special": False}}},
    "added tokens of numbers": {"added_tokens_decoder": {"3": {"content": 3}}},
    "a chat template of numbers": {"chat_template": 3},
    "chat templates without names": {"chat_template": [{"a": 1}]},
    "chat templates of numbers": {"chat_template": [1, 2]},
    "chat templates without default": {"chat_template": [{"name": "rag", "template": "x"}]},
    "remote code": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
}


@pytest.fixture
def folder(checkpoint: Path, canaries: Canaries) -> Path:
    """A checkpoint without weights, to be spoilt."""
    copy = canaries.work / "model"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def refused(folder: Path, canaries: Canaries) -> str:
    with pytest.raises(UserError) as error:
        Checkpoint(folder).tokenizer()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    canaries.check(str(error.value))
    return str(error.value)


@pytest.mark.parametrize("change", TOKENIZER.values(), ids=TOKENIZER.keys())
def test_tokenizer_json(change: Change | str, folder: Path, canaries: Canaries) -> None:
    path = folder / "tokenizer.json"
    path.write_text(
        change if isinstance(change, str) else canaries.fill(json.dumps(change(json.loads(path.read_text()))))
    )
    refused(folder, canaries)


@pytest.mark.parametrize("change", CONFIG.values(), ids=CONFIG.keys())
def test_tokenizer_config(change: dict[str, Any] | str, folder: Path, canaries: Canaries) -> None:
    path = folder / "tokenizer_config.json"
    if isinstance(change, dict) and "chat_template" in change:
        (folder / "chat_template.jinja").unlink()
    if isinstance(change, dict) and "auto_map" in change:
        (folder / "evil.py").write_text(canaries.fill("open('RAN', 'w')"))
        (folder / "tokenizer.json").unlink()
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    refused(folder, canaries)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "vocab.json",
        "tokenizer.model",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nowhere"])
def test_files_that_are_none(name: str, kind: str, folder: Path, canaries: Canaries) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    assert name in refused(folder, canaries)


@pytest.mark.parametrize("text", ['"deep', "{}x", "[]", '{"eos_token": 3}', '{"eos_token": {"content": []}}'])
def test_special_tokens_map(text: str, folder: Path, canaries: Canaries) -> None:
    (folder / "special_tokens_map.json").write_text(text)
    refused(folder, canaries)


def test_more_templates_are_not_read(folder: Path, canaries: Canaries) -> None:
    """A pipe among them would keep whoever opens it waiting."""
    own = Checkpoint(folder).tokenizer().chat_template
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "rag.jinja")
    assert Checkpoint(folder).tokenizer().chat_template == own
    canaries.check()


@pytest.mark.parametrize("text", ["{", "[1]", "7", '{"a": ' * 99_999])
def test_whether_there_is_a_template_is_asked_of_a_strangers_file_too(text: str, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer_config"):
        _ = Checkpoint(folder).has_chat_template


PUBLISHED = {
    "gpt 2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*",
    "gemma": r" {2,}",
    "digits": r"(?=(\d{3})+(?!\d))",
}  # fmt: skip


@pytest.mark.parametrize("pattern", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_patterns_of_published_tokenizers_pass(pattern: str) -> None:
    check_pattern(pattern, "it")


@pytest.mark.parametrize("pattern", PUBLISHED.values(), ids=PUBLISHED.keys())
@pytest.mark.parametrize(
    "text", [" " * 20_000, "a" * 20_000, "1" * 20_000, "a1 .\n" * 4_000 + "x"], ids=["s", "a", "1", "m"]
)
def test_what_passes_is_quick_on_long_texts(pattern: str, text: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    assert pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)


def test_the_tokenizer_is_the_one_that_transformers_opens(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    own, stock = open_tokenizer(checkpoint, None), AutoTokenizer.from_pretrained(checkpoint)
    assert own.backend_tokenizer.to_str() == stock.backend_tokenizer.to_str()
    assert own.chat_template == stock.chat_template


@pytest.mark.parametrize("change", ["a repeated group", "doubling", "garbage"])
def test_generate_refuses_such_a_tokenizer(change: str, checkpoint: Path, small: list[str], canaries: Canaries) -> None:
    folder = canaries.work / "model"
    shutil.copytree(checkpoint, folder)
    path, how = folder / "tokenizer.json", TOKENIZER[change]
    path.write_text(how if isinstance(how, str) else json.dumps(how(copy.deepcopy(json.loads(path.read_text())))))
    outcome = run("generate", *small, f"model.path={folder}", cwd=canaries.work / "run")
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "tokenizer.json" in outcome.errors[0]


GIVES_UP = split(r"\p{L}*\p{L}*\p{L}*(?=\p{N})")
"""Passes, and takes the library more steps at one place than it allows itself: only on a text of some 1,000 letters."""


def test_a_text_over_which_the_library_panics_costs_one_line(
    checkpoint: Path, small: list[str], canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> None:
    """The compiled library's own lines go to the process's stderr, beside Python's."""
    folder = canaries.work / "model"
    shutil.copytree(checkpoint, folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(GIVES_UP(json.loads(path.read_text()))))
    rows = canaries.work / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a" * 1_500, "reference": "b"}) + "\n")
    words = [f"model.path={folder}", "dataset=local", f"dataset.path={rows}", "dataset.num_rows=null"]
    outcome = run("generate", *small, *words, cwd=canaries.work / "run")
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
    assert "the tokenizer gives up on a text (" in outcome.errors[0]
    assert "panick" not in outcome.stderr + capfd.readouterr().err


def test_what_others_write_while_a_tokenizer_works_comes_out(capfd: pytest.CaptureFixture[str]) -> None:
    with panics_told():
        os.write(2, b"one\n")
        with panics_told():
            os.write(2, b"two\n")
    with pytest.raises(KeyError), panics_told():
        os.write(2, b"three\n")
        raise KeyError
    assert capfd.readouterr().err == "one\ntwo\nthree\n"


def test_a_tokenizer_works_where_there_is_no_stderr(checkpoint: Path) -> None:
    was = os.dup(2)
    os.close(2)
    try:
        assert len(open_tokenizer(checkpoint, None)("a b")["input_ids"])
    finally:
        os.dup2(was, 2)
        os.close(was)
