"""Files of rows from strangers: one line with the place, in bounded time and memory."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Canaries
from launching import run

from sdd.answers import RULES, equal, extract
from sdd.data import files
from sdd.data.files import read_rows
from sdd.data.instruct import GSM8K, Alpaca, Dolly, OpenMathInstruct2
from sdd.data.local import LocalRows
from sdd.data.texts import CorpusTexts, LocalTexts, WikiText2
from sdd.errors import UserError

GOOD = b'{"prompt": "2 + 2?", "reference": "4", "text": "two words"}\n'
Made = bytes | Callable[[Path], None]


def zipped(data: bytes, repeated: int = 1) -> bytes:
    return gzip.compress(data * repeated, mtime=0)


def linked(path: Path) -> None:
    path.symlink_to(path)


def table(**columns: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), path, compression="zstd")

    return write


def constant(rows: int, words: str) -> Callable[[Path], None]:
    """A column of one text that every row names."""

    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        column = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), pa.array([words]))
        pq.write_table(pa.table(dict.fromkeys(("prompt", "reference", "text"), column)), path)

    return write


def nested(kind: str, times: int, words: str) -> Callable[[Path], None]:
    """One row with a list, a struct or a table of a text that is stored once."""

    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        named = pa.array([words] * times)
        column = {
            "list": lambda: pa.ListArray.from_arrays([0, times], named),
            "struct": lambda: pa.StructArray.from_arrays([named], ["a"]),
            "table": lambda: pa.MapArray.from_arrays([0, times], pa.array(list(map(str, range(times)))), named),
        }[kind]()
        rows = len(column)
        columns = {name: ["a b"] * rows for name in ("prompt", "reference", "text")} | {"more": column}
        pq.write_table(pa.table(columns), path, compression="zstd")

    return write


def zoned(path: Path) -> None:
    """A time in a zone that is none."""
    import pyarrow as pa

    table(prompt=["a"], reference=["b"], text=["a b"], at=pa.array([1], pa.timestamp("s", tz="No/Zone")))(path)


def damaged(at: int, data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table(prompt=["a b"] * 9, reference=["b"] * 9, text=["a b"] * 9)(path)
        content = bytearray(path.read_bytes())
        content[at : at + len(data) if at + len(data) else None] = data
        path.write_bytes(bytes(content))

    return write


HOSTILE: dict[str, tuple[str, Made]] = {
    "a pipe": ("rows.jsonl", os.mkfifo),
    "a zipped pipe": ("rows.jsonl.gz", os.mkfifo),
    "a Parquet pipe": ("rows.parquet", os.mkfifo),
    "a device": ("rows.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "a zipped device": ("rows.jsonl.gz", lambda path: path.symlink_to("/dev/random")),
    "a terminal": ("rows.jsonl", lambda path: path.symlink_to("/dev/stdin")),
    "a link to itself": ("rows.jsonl", linked),
    "an empty folder": ("rows", lambda path: path.mkdir()),
    "nothing": ("rows.jsonl", b""),
    "a long line": ("rows.jsonl", b'{"prompt": "' + b"x" * 3_000_000),
    "a line that does not end": ("rows.jsonl", GOOD + b" " * 3_000_000),
    "a bomb of one line": ("rows.jsonl.gz", zipped(b'"' + b"x" * 3_000_000)),
    "a bomb of blank lines": ("rows.jsonl.gz", zipped(b"\n", 3_000_000)),
    "a bomb of rows": ("rows.jsonl.gz", zipped(GOOD, 60_000)),
    "a bomb behind a row": ("rows.jsonl.gz", zipped(GOOD) + zipped(b"\n" * 1000, 3_000)),
    "a bomb in a bomb": ("rows.jsonl.gz", zipped(zipped(b"\n", 3_000_000), 9)),
    "half a gzip file": ("rows.jsonl.gz", zipped(GOOD, 100)[:40]),
    "no gzip file": ("rows.jsonl.gz", GOOD),
    "a broken gzip file": ("rows.jsonl.gz", zipped(GOOD)[:-8] + b"\0" * 8),
    "deep JSON": ("rows.jsonl", b'{"prompt": ' + b"[" * 200_000 + b"\n"),
    "deep JSON in a row": ("rows.jsonl", b'{"a": ' * 99_999 + b"1" + b"}" * 99_999 + b"\n"),
    "a number of many digits": ("rows.jsonl", b'{"prompt": ' + b"9" * 9000 + b"}\n"),
    "a list": ("rows.jsonl", b"[1]\n"),
    "a text": ("rows.jsonl", b'"\\u001b[2J"\n'),
    "no UTF-8": ("rows.jsonl", b'{"prompt": "\xff\xfe"}\n'),
    "UTF-16": ("rows.jsonl", GOOD.decode().encode("utf-16")),
    "half a character": ("rows.jsonl", b'{"prompt": "a \\ud800", "reference": "b", "text": "a b \\ud800"}\n'),
    "half a character in a name": ("rows.jsonl", b'{"\\uDFFF": 1, "prompt": "a", "reference": "b", "text": "a b"}\n'),
    "half a character deep inside": ("rows.jsonl", b'{"a": [{"b": "\\udc00"}], "prompt": "a", "text": "a b"}\n'),
    "the second row": ("rows.jsonl", GOOD + b'{"prompt": 7, "text": 7}\n'),
    "a text that is a list": ("rows.jsonl", b'{"prompt": ["a"], "reference": "b", "text": ["a"]}\n'),
    "a text that is null": ("rows.jsonl", b'{"prompt": null, "reference": "b", "text": null}\n'),
    "no Parquet": ("rows.parquet", GOOD),
    "an empty Parquet file": ("rows.parquet", b""),
    "a Parquet file of magic only": ("rows.parquet", b"PAR1\xff\xff\xff\x7fPAR1"),
    "a Parquet footer that lies": ("rows.parquet", damaged(-8, b"\xff\xff\xff\x7f")),
    "a damaged page": ("rows.parquet", damaged(4, b"\xff" * 40)),
    "a damaged schema": ("rows.parquet", damaged(-60, b"\xff" * 30)),
    "a Parquet file without columns": ("rows.parquet", table(a=[1])),
    "columns with control characters": ("rows.parquet", table(**{"\x1b[2J\n": [1]})),
    "a dictionary that every row names": ("rows.parquet", constant(5_000, "word " * 2_000)),
    "a list that names one text": ("rows.parquet", nested("list", 5_000, "word " * 2_000)),
    "a struct that names one text": ("rows.parquet", nested("struct", 5_000, "word " * 2_000)),
    "a table that names one text": ("rows.parquet", nested("table", 5_000, "word " * 2_000)),
    "a time in no zone": ("rows.parquet", zoned),
    "a row group of many rows": ("rows.parquet", constant(2_000_000, "a b")),
    "numbers for texts": ("rows.parquet", table(prompt=[1], reference=[2], text=[3])),
    "lists for texts": ("rows.parquet", table(prompt=[["a"]], reference=[["b"]], text=[["a"]])),
    "bytes for texts": ("rows.parquet", table(prompt=[b"\xff"], reference=[b"\xff"], text=[b"\xff"])),
}


def write(name: str, made: Made, folder: Path) -> Path:
    path = folder / name
    if callable(made):
        made(path)
    else:
        path.write_bytes(made)
    return path


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_BYTES", 2 << 20)
    monkeypatch.setattr(files, "FREE_BYTES", 1 << 20)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "dataset": lambda path: LocalRows(str(path)).spec(),
    "calibration": lambda path: CorpusTexts(10_000_000, str(path)).spec(),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_rows_of_a_stranger_are_refused_in_one_line(
    case: tuple[str, Made], source: Callable[[Path], Any], canaries: Canaries, bounds: None
) -> None:
    path = write(*case, canaries.work)
    with pytest.raises(UserError) as error:
        source(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    assert str(path) in str(error.value)
    canaries.check(str(error.value))


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "a link out": lambda folder, outside: (folder / "train.jsonl").symlink_to(outside),
    "a link to a secret's folder": lambda folder, outside: (folder / "train.jsonl").symlink_to(outside.parent),
    "a linked part": lambda folder, outside: (folder / "train-1.parquet").symlink_to(outside),
    "a linked folder of parts": lambda folder, outside: (folder / "data").symlink_to(outside.parent),
    "a relative link": lambda folder, outside: (folder / "train.jsonl").symlink_to("../../outside.txt"),
    "one pipe": lambda folder, outside: os.mkfifo(folder / "train.jsonl"),
    "a pipe of another name": lambda folder, outside: os.mkfifo(folder / "mine.jsonl.gz"),
    "a folder": lambda folder, outside: (folder / "train.parquet").mkdir(),
}


@pytest.mark.parametrize("make", FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_holds_its_own_files(make: Callable[[Path, Path], None], canaries: Canaries) -> None:
    folder = canaries.work / "rows"
    folder.mkdir()
    (canaries.outside.parent / "train-1.parquet").write_bytes(GOOD)
    make(folder, canaries.outside)
    for source in SOURCES.values():
        with pytest.raises(UserError) as error:
            source(folder)
        canaries.check(str(error.value))


IDS = {
    "the same twice": ["a", "a"],
    "a number and its text": [1, "1"],
    "a list": [["a"], "b"],
    "an object": [{"a": 1}, "b"],
    "the same with a new line": ["a\n\x1b[2J", "a\n\x1b[2J"],
    "a truth": [True, "True"],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_ids_are_unique_texts_or_numbers(ids: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": id, "prompt": "a", "reference": "b"}) + "\n" for id in ids))
    with pytest.raises(UserError) as error:
        LocalRows(str(path)).examples()
    assert str(error.value).isprintable()


ODD = [
    (Dolly, {"instruction": "a", "context": ["x"], "response": "b", "category": {"a": []}}),
    (Alpaca, {"instruction": "a", "input": {"x": 1}, "output": "b"}),
    (OpenMathInstruct2, {"problem": "a", "generated_solution": "b", "expected_answer": "c", "problem_source": [[]]}),
]


@pytest.mark.parametrize(("kind", "row"), ODD)
def test_fields_beside_the_texts_do_no_harm(kind: Any, row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (example,) = kind(str(path)).examples()
    assert (example.prompt, example.reference, example.group) == ("a", "b", None)


@pytest.mark.parametrize("source", [GSM8K, Dolly, lambda path: WikiText2(5, path), lambda path: LocalTexts(5, path)])
def test_every_reader_is_held_to_it(source: Any, canaries: Canaries) -> None:
    path = canaries.work / "rows.jsonl"
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        source(str(path)).spec()


LONG = 20_000
ANSWERS = {
    "stars": "answer" + "*" * LONG,
    "spaces": "answer" + " " * LONG,
    "digits": "9" * LONG,
    "commas": "1," * LONG,
    "brackets": "(" * LONG + ")" * LONG,
    "statements": "the answer is " * (LONG // 10) + "\n",
    "marks": "#### " * (LONG // 10) + "\t",
    "boxes": "\\boxed{" * LONG,
    "dollars": "$" * LONG,
    "alternatives": "#### " + "6 or " * (LONG // 5),
    "equations": "answer is " + "or x = " * (LONG // 7),
    "claims": "answer is 6 or 7 x " * (LONG // 20),
    "fractions": "1 1/1 " * (LONG // 6),
    "begun fractions": "\\frac{1}{" * (LONG // 9),
    "ranges": "1-" * LONG,
    "parts": "6" + " and a half" * (LONG // 10),
    "begun parts": "half of the " * (LONG // 10),
    "exponents": "1e" * LONG + "1^" * LONG,
    "alternative boxes": "\\boxed{1} or " * (LONG // 12),
}


@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS.keys())
def test_answers_of_any_length_are_read_in_time(text: str, canaries: Canaries) -> None:
    for rule in RULES:
        answer = extract(text, rule)
        assert equal(answer or text, answer or text)
        assert not equal(answer or text, f"{answer or text} 1 b")


def test_ordinary_files_are_read_as_ever(tmp_path: Path, bounds: None) -> None:
    rows = [{"prompt": f"{n} ä🙂 \x00?", "reference": f"{n**40:x}", "id": n, "n": [n]} for n in range(3000)]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    for name, data in (("a.jsonl", lines), ("a.jsonl.gz", gzip.compress(lines))):
        (tmp_path / name).write_bytes(data)
        assert [row for _, row in read_rows([tmp_path / name], "it")] == rows
    table(**{key: [row[key] for row in rows] for key in rows[0]})(tmp_path / "a.parquet")
    read = list(read_rows([tmp_path / "a.parquet"], "it"))
    assert [row for _, row in read] == rows
    assert read[-1][0].endswith("row 3000")


def test_a_path_that_is_a_link_and_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    cache, typed = tmp_path / "datasets--a--b", tmp_path / "typed.jsonl"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "c0ffee").mkdir(parents=True)
    (cache / "blobs" / "1").write_bytes(GOOD)
    (cache / "snapshots" / "c0ffee" / "train.jsonl").symlink_to("../../blobs/1")
    typed.symlink_to(cache / "blobs" / "1")
    for path in (typed, cache / "snapshots" / "c0ffee"):
        assert len(LocalRows(str(path)).examples()) == 1


@pytest.mark.parametrize("name", ["a pipe", "a bomb of blank lines", "half a character", "deep JSON"])
def test_generate_refuses_such_rows(name: str, small: list[str], canaries: Canaries, bounds: None) -> None:
    path = write(*HOSTILE[name], canaries.work)
    outcome = run("generate", *small, "dataset=local", f"dataset.path={path}", cwd=canaries.work / "run")
    canaries.check_refused(outcome)
