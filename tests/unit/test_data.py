"""Rows from files and from the embedded tasks: which ones, in which order, and what is said of a broken one."""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sdd.config import schema
from sdd.config.parts import PLACES
from sdd.data import Example
from sdd.data.files import read_rows
from sdd.data.local import LocalRows
from sdd.data.rows import Rows
from sdd.data.texts import LocalTexts
from sdd.data.tiny import TinyTasks, TinyTexts
from sdd.errors import UserError
from sdd.stages.datasets import read_examples
from sdd.stages.runtime import Runtime
from sdd.study import rows as study

ROW = {"prompt": "2 + 2?", "reference": "four"}


def written(path: Path, *rows: Any) -> str:
    """A file of rows; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def numbered(path: Path, n: int) -> str:
    return written(path, *({"prompt": f"p{i}", "reference": f"r{i}"} for i in range(n)))


# ---- files ------------------------------------------------------------------------------------------------------


def test_rows_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = (
        {"id": "a", "prompt": "p", "reference": "r", "answer": 7},
        b"",
        {"prompt": "q", "reference": "s", "answer": None, "other": [1]},
        {"id": 12, "prompt": "täglich 🙂", "reference": "t"},
    )
    path = tmp_path / "rows.jsonl"
    examples = LocalRows(written(path, *rows)).examples()
    assert [(e.id, e.prompt, e.reference, e.answer) for e in examples] == [
        ("a", "p", "r", "7"),
        ("1", "q", "s", None),
        ("12", "täglich 🙂", "t", None),
    ]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert LocalRows(str(path)).examples() == examples


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"from": "human", "value": "And 3 + 3?"},
    {"role": "assistant", "content": [{"type": "text", "text": "six"}]},
    {"role": "user", "content": "Thanks"},
]


def test_a_conversation_is_its_last_answer_after_what_came_before(tmp_path: Path) -> None:
    """In JSONL and Parquet, by the column's own name or by another, with a system prompt of the row's own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    before = ({"role": "system", "content": "Be brief."}, *TURNS[1:3])
    expected = Example("0", "And 3 + 3?", "six", before=before)
    path = written(tmp_path / "rows.jsonl", {"messages": TURNS}, ROW)
    assert LocalRows(path).examples() == [expected, Example("1", ROW["prompt"], ROW["reference"])]
    named = written(
        tmp_path / "named.jsonl", {"talk": TURNS[1:], "how": "Be brief."}, {"talk": TURNS[3:5], "how": None}
    )
    examples = LocalRows(named, fields={"messages": "talk", "system": "how"}).examples()
    assert examples == [expected, Example("1", "And 3 + 3?", "six")]
    prompts = written(tmp_path / "prompts.jsonl", ROW | {"system": "Be brief.", "messages": TURNS})
    assert LocalRows(prompts).examples()[0].before == ()
    assert LocalRows(prompts, fields={"system": "system"}).examples()[0].before == before[:1]
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in TURNS[:3]]
    pq.write_table(pa.Table.from_pylist([{"messages": plain}]), tmp_path / "rows.parquet")
    assert LocalRows(str(tmp_path / "rows.parquet")).examples() == [Example("0", "2 + 2?", "4", before=before[:1])]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "line 1: the field 'messages' is no list of turns"),
        ([TURNS[1]], "has no turn of the assistant"),
        ([TURNS[2]], "no turn of the user comes before"),
        ([TURNS[1], TURNS[2], TURNS[2]], "no turn of the user comes before"),
        ([TURNS[1], TURNS[0], TURNS[1], TURNS[2]], "the system's turn is not the first"),
        ([{"role": "tool", "content": "x"}, *TURNS[1:3]], "turn 1 has the role tool; known are system, user"),
        ([{"role": "user", "content": ""}, TURNS[2]], "turn 1 has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}, TURNS[2]], "turn 1 has no text"),
        (["hello"], "turn 1 is not"),
    ],
)
def test_a_broken_conversation_is_named_by_turn(messages: Any, expected: str, tmp_path: Path) -> None:
    rows = LocalRows(written(tmp_path / "rows.jsonl", {"messages": messages}), fields={"messages": "messages"})
    with pytest.raises(UserError) as refusal:
        rows.examples()
    assert expected in str(refusal.value)


BROKEN_ROWS: dict[str, tuple[Any, str]] = {
    "no JSON": (b'{"prompt": "p", "reference": ', "line 3 is not valid JSON"),
    "a list": ([1, 2], "line 3 is not a JSON object"),
    "no prompt": ({"reference": "r"}, "line 3 has no field 'prompt'"),
    "no reference": ({"prompt": "p"}, "line 3 has no field 'reference'"),
    "empty reference": ({"prompt": "p", "reference": "  "}, "line 3 has no text in the field 'reference'"),
    "number for text": ({"prompt": 7, "reference": "r"}, "line 3 has no text in the field 'prompt'"),
    "null": ({"prompt": None, "reference": "r"}, "line 3 has no text in the field 'prompt'"),
    "repeated id": ({"id": "0", **ROW}, "line 3 repeats the id '0' of line 1; ids must be unique"),
    "no UTF-8": (b'{"prompt": "\xff", "reference": "r"}', "line 3 is not UTF-8"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", list(BROKEN_ROWS))
def test_a_broken_row_is_named_by_file_and_line(name: str, packed: bool, tmp_path: Path) -> None:
    row, message = BROKEN_ROWS[name]
    path = written(tmp_path / "rows.jsonl", ROW, ROW, row, ROW, ROW)
    if packed:
        path += ".gz"
        Path(path).write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    with pytest.raises(UserError) as caught:
        LocalRows(path).examples()
    assert f"dataset.path={path}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_of_a_bad_byte_is_right_far_into_a_file(tmp_path: Path) -> None:
    """Text files are decoded ahead in blocks: the line being read is not the one that is wrong."""
    path = written(tmp_path / "rows.jsonl", *[ROW] * 40, b'{"prompt": "\xff", "reference": "r"}', ROW)
    with pytest.raises(UserError, match="line 41 is not UTF-8"):
        LocalRows(path).examples()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "is empty"), (b"\n  \n", "is empty")],
)
def test_missing_and_empty_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    for source, what in ((LocalRows(str(path)).examples, "dataset"), (LocalTexts(4, str(path)).texts, "calibration")):
        with pytest.raises(UserError, match=message) as caught:
            source()
        assert f"{what}.path={path}" in str(caught.value)


def test_a_path_must_be_named() -> None:
    with pytest.raises(UserError, match=r"dataset\.path is not set"):
        LocalRows()
    with pytest.raises(UserError, match=r"calibration\.path is not set"):
        LocalTexts(4)


def test_settings_of_the_embedded_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.families"):
        LocalRows(written(tmp_path / "rows.jsonl", ROW), families=["sort"])


def test_gz_reads_as_the_plain_file_does(tmp_path: Path) -> None:
    plain = Path(numbered(tmp_path / "rows.jsonl", 5))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert LocalRows(str(packed)).examples() == LocalRows(str(plain)).examples()


def test_damaged_gz_files_are_a_users_mistake(tmp_path: Path) -> None:
    whole = gzip.compress(Path(numbered(tmp_path / "rows.jsonl", 500)).read_bytes())
    spoiled = bytearray(whole)
    spoiled[len(whole) // 2 : len(whole) // 2 + 8] = b"\xff" * 8
    path = tmp_path / "rows.jsonl.gz"
    for content in (whole[: len(whole) // 2], b"not gzip at all", bytes(spoiled)):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            list(read_rows([path], "dataset.path"))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_samples_are_prefixes_of_one_permutation(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", 20)
    whole = LocalRows(path).examples()
    assert [e.id for e in whole] == [str(i) for i in range(20)]
    samples = [LocalRows(path, num_rows=n, seed=3).examples() for n in (1, 7, 20)]
    assert samples[0] == samples[2][:1]
    assert samples[1] == samples[2][:7]
    assert samples[2] != whole
    assert sorted(samples[2], key=lambda e: int(e.id)) == whole
    assert LocalRows(path, num_rows=7, seed=4).examples() != samples[1]
    assert LocalRows(path, num_rows=7, seed=3).examples() == samples[1]


def test_more_rows_than_there_are(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", 20)
    with pytest.raises(UserError) as caught:
        LocalRows(path, num_rows=21).examples()
    assert str(caught.value) == f"dataset.num_rows=21, but {path} has 20 rows"


def test_the_spec_names_content_and_not_place(tmp_path: Path) -> None:
    one, other = numbered(tmp_path / "one.jsonl", 5), numbered(tmp_path / "other.jsonl", 5)
    assert LocalRows(one).spec() == LocalRows(other).spec()
    assert LocalRows(one, seed=1).spec() == LocalRows(one, seed=2).spec(), "nothing is drawn"
    assert LocalRows(one, 3, seed=1).spec() != LocalRows(one, 3, seed=2).spec()
    assert LocalRows(numbered(tmp_path / "longer.jsonl", 6)).spec() != LocalRows(one).spec()


def test_texts_are_the_first_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "texts.jsonl", *({"text": f" text {i} "} for i in range(5)), {"broken": 1})
    assert LocalTexts(3, path).texts() == [" text 0 ", " text 1 ", " text 2 "]
    with pytest.raises(UserError) as caught:
        LocalTexts(6, path).texts()
    assert str(caught.value) == f"calibration.path={path}: line 6 has no field 'text'"


# ---- embedded ---------------------------------------------------------------------------------------------------


def test_embedded_rows_are_a_prefix_of_a_longer_draw() -> None:
    longer = TinyTasks(num_rows=40, seed=2).examples()
    assert TinyTasks(num_rows=17, seed=2).examples() == longer[:17]
    assert TinyTasks(num_rows=17, seed=3).examples() != longer[:17]
    assert len({example.id for example in longer}) == 40
    assert {example.group for example in TinyTasks(["word", "sort"], 10).examples()} == {"word", "sort"}
    assert all(example.gold and example.answer for example in longer)


def test_the_spec_of_embedded_rows_follows_the_rows() -> None:
    spec = TinyTasks(num_rows=10).spec()
    assert TinyTasks(num_rows=10).spec() == spec
    assert len({s["digest"] for s in (spec, TinyTasks(num_rows=11).spec(), TinyTasks(num_rows=10, seed=1).spec())}) == 3


def test_wrong_settings_of_the_embedded_sources() -> None:
    with pytest.raises(UserError, match="unknown family 'poetry'"):
        TinyTasks(["poetry"], 4).examples()
    with pytest.raises(UserError, match="dataset=local"):
        TinyTasks(path="rows.jsonl")
    with pytest.raises(UserError, match="calibration=local"):
        TinyTexts(4, path="texts.jsonl")


def test_embedded_texts_are_conversations_cut_inside_the_answer() -> None:
    texts = TinyTexts(32).texts()
    assert TinyTexts(32).texts() == texts
    assert len(set(texts)) == 32
    answers = []
    for text in texts:
        head, answer = text.split("<|end|><|assistant|>")
        assert head.startswith("<|user|>")
        assert answer.strip()
        answers.append(answer)
    endings = {answer.split()[-1] for answer in answers}
    assert len(endings) > 16, "texts that all end alike would be measured at one token"


# ---- settings of a class's own ----------------------------------------------------------------------------------


class LongRows(Rows):
    """Rows whose prompt has at least so many characters."""

    columns = ("prompt", "reference")

    def __init__(
        self,
        path: str | None = None,
        num_rows: int | None = None,
        seed: int = 0,
        families: list[str] | None = None,
        hub: dict[str, Any] | None = None,
        least: int = 0,
    ) -> None:
        super().__init__(path, num_rows, seed, families, hub)
        self.least = least

    def example(self, row: dict[str, Any], id: str, place: str) -> Example | None:
        return Example(id, row["prompt"], row["reference"]) if len(row["prompt"]) >= self.least else None


@dataclass
class LongPart(schema.Part):
    least: int | None = None


@dataclass
class LongDataset(schema.Dataset):
    least: int | None = None
    parts: dict[str, LongPart] = field(default_factory=dict)


@pytest.fixture
def long_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A node of `LongRows`, which has an id and, in the schema, a setting of its own."""
    monkeypatch.setitem(PLACES, "sdd.data.LongRows", __name__)
    rows = [{"prompt": "p" * n, "reference": "r"} for n in range(1, 9)]
    return {"_target_": "sdd.data.LongRows", "name": "long", "path": written(tmp_path / "long.jsonl", *rows)}


def asked(**node: Any) -> tuple[study.Rows, Runtime]:
    rows = study.Rows(OmegaConf.structured(LongDataset(**node)), {})
    return rows, Runtime(sources=rows.sources if rows.spec else {})


def test_a_setting_of_a_class_of_its_own_is_in_the_key_and_read_back(long_rows: dict[str, Any]) -> None:
    rows, runtime = asked(**long_rows, least=6)
    assert rows.spec["least"] == 6
    assert rows.examples is not None
    assert [len(example.prompt) for example in rows.examples] == [6, 7, 8]
    assert read_examples(runtime, rows.spec) == rows.examples
    assert "least" not in asked(**long_rows)[0].spec, "what is off adds nothing to an address"


def test_a_setting_of_a_part_of_a_mixture_is_in_the_key_and_read_back(long_rows: dict[str, Any]) -> None:
    parts = {"a": LongPart(**long_rows, least=6), "b": LongPart(**long_rows)}
    rows, runtime = asked(_target_="sdd.data.mixture.Mixture", name="both", parts=parts, num_rows=4)
    assert [part.get("least") for part in rows.spec["parts"].values()] == [6, None]
    assert rows.examples is not None
    assert all(len(example.prompt) >= 6 for example in rows.examples if example.id.startswith("a/"))
    assert read_examples(runtime, rows.spec) == rows.examples


def test_a_setting_that_a_class_does_not_know_is_refused(long_rows: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"sdd\.data\.local\.LocalRows: got an unexpected keyword argument 'least'"):
        asked(**long_rows | {"_target_": "sdd.data.local.LocalRows"}, least=6)
    rows, runtime = asked(**long_rows)
    with pytest.raises(UserError, match=r"sdd\.data\.LongRows: got an unexpected keyword argument 'most'"):
        read_examples(runtime, rows.spec | {"most": 6})
    assert read_examples(runtime, rows.spec | {"path": "/etc/passwd"}) == rows.examples, "a recipe names no path"
    parts = {name: LongPart(**long_rows) for name in "ab"}
    with pytest.raises(UserError, match=r"sdd\.data\.mixture\.Mixture: got an unexpected keyword argument 'least'"):
        asked(_target_="sdd.data.mixture.Mixture", name="both", parts=parts, num_rows=4, least=6)


def test_a_setting_that_a_class_does_not_keep_is_no_key(long_rows: dict[str, Any], monkeypatch: Any) -> None:
    def forgetful(self: Any, path: Any = None, num_rows: Any = None, seed: int = 0, least: int = 0) -> None:
        Rows.__init__(self, path)

    monkeypatch.setattr(LongRows, "__init__", forgetful)
    with pytest.raises(AttributeError, match="least"):
        asked(**long_rows, least=6)
