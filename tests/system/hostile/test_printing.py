"""Text of a stranger's reaches the terminal as text."""

import os
from pathlib import Path

import pytest

from sdd.errors import UserError
from sdd.untrusted import check_inside, parse_json, printable, read_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\r\nb", "a\\r\\nb"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
        ("\x9b31m", "\\x9b31m"),
        ("größer 模型 🙂", "größer 模型 🙂"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 5000, "{", '{"a": '], ids=["deep", "long", "open", "cut"])
def test_json_of_a_stranger_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^model: .*JSON"):
        parse_json(text, "model")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"{}" + b" " * 100)
    (tmp_path / "latin").write_bytes(b'{"a": "\xe4"}')
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "large", "latin", "folder", "missing", "na\0me"):
        with pytest.raises(UserError, match=r"^it: "):
            read_json(tmp_path / name, "it", at_most=50)


def test_link_out_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.touch()
    (inside / "file").touch()
    (inside / "own").symlink_to("file")
    (inside / "out").symlink_to(outside)
    (inside / "circle").symlink_to("circle")
    check_inside(inside / "own", inside, "it")
    for name in ("out", "circle"):
        with pytest.raises(UserError, match=r"^it: a link"):
            check_inside(inside / name, inside, "it")
