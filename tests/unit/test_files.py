"""Rows of artifacts: gone through in any order without being held, written whole or not at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdd.errors import UserError
from sdd.store.files import Lines, read_jsonl, write_jsonl

ROWS = [{"id": f"{number}", "text": text} for number, text in enumerate(["a\nb", "ü€😀", "", "\u2028", "x" * 9_000])]


def test_lines_are_the_rows_in_any_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    lines = Lines(tmp_path / "rows.jsonl")
    assert len(lines) == len(ROWS)
    assert list(lines) == list(lines) == list(read_jsonl(tmp_path / "rows.jsonl")) == ROWS
    assert list(lines.at([4, 0, 2])) == [ROWS[4], ROWS[0], ROWS[2]]
    assert list(lines.at([3, 1, 0])[:2]) == [ROWS[3], ROWS[1]]
    assert len(lines.at([])) == 0
    placed = Lines(tmp_path / "rows.jsonl", placed=True).at([4, 1])
    assert list(placed) == [ROWS[4] | {"place": 4}, ROWS[1] | {"place": 1}]


def test_blank_lines_are_no_rows_and_nonsense_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n\n  \n{"id": 2}')
    assert [row["id"] for row in Lines(path).at([1, 0])] == [2, 1]
    path.write_text('{"id": 1}\n[2]\n')
    with pytest.raises(UserError, match="row 2: not a JSON object"):
        list(Lines(path))


def test_rows_that_end_in_an_error_leave_what_was_there(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield ROWS[0]
        raise RuntimeError("the engine")

    write_jsonl(tmp_path / "rows.jsonl", ROWS[:2])
    with pytest.raises(RuntimeError, match="the engine"):
        write_jsonl(tmp_path / "rows.jsonl", broken())
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == ROWS[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
