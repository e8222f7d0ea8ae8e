"""Every command that the README and `docs/` show is one: its words compose, its options are known."""

import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.types import RunMode
from launching import REPOSITORY
from omegaconf import open_dict

from sdd.cli.loader import own_loader
from sdd.cli.program import FETCH, SCRIPTS, TOOLS
from sdd.cli.words import arranged
from sdd.config import check_values

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands() -> Iterator[str]:
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split(" -- "):  # `sdd serve ... -- COMMAND`
                    if part.startswith(("python ", "make ", "sdd ")):
                        part = part.replace("{url}", "http://localhost/v1").replace("{model}", "served")
                        yield plain(part.partition(" #")[0].strip())


def plain(command: str) -> str:
    """A command of the program `sdd` as the script or module that it runs."""
    program, name, *words = command.split(" ")
    if program != "sdd":
        return command
    if name == FETCH:
        return " ".join(["python evaluate.py", *words])
    if name in SCRIPTS:
        return " ".join([f"python {name}.py", *words])
    module, function = TOOLS[name]
    return " ".join([f"python -m {module}", *([] if function == "main" else [function]), *words])


COMMANDS = sorted(set(commands()))


def first_choices(words: list[str]) -> list[str]:
    """The words of a sweep's first job."""
    found = []
    for word in arranged(["-m", *words])[1:]:
        override = OverridesParser.create().parse_override(word)
        if override.is_sweep_override():
            first = next(iter(override.sweep_string_iterator()))
            assert not isinstance(first, Glob)
            found.append(f"{override.input_line.partition('=')[0]}={first}")
        else:
            found.append(word)
    return found


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"python \w+\.py", c)])
def test_script_composes(command: str) -> None:
    script, *words = shlex.split(command)[1:]
    assert (REPOSITORY / script).is_file()
    is_sweep = words[:1] == ["-m"]
    words = words[is_sweep:]
    launcher = [word for word in words if word.startswith("hydra")]
    loader = own_loader()
    loader.load_configuration("config", launcher, RunMode.RUN)
    config = loader.load_configuration(
        "config", first_choices([word for word in words if word not in launcher]), RunMode.RUN
    )
    with open_dict(config):
        del config.hydra
    check_values(config)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m")])
def test_module_has_the_command(command: str) -> None:
    module, *words = shlex.split(command)[2:]
    own = importlib.import_module(f"{module}.__main__" if (REPOSITORY / module.replace(".", "/")).is_dir() else module)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        own.main([*words[: words.index("ADDRESS") if "ADDRESS" in words else len(words)], "--help"])
    assert end.value.code == 0
    options = [word for word in words if word.startswith("--")]
    assert all(option in out.getvalue() for option in options)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_has_the_target(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.M)


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    readme = Path(REPOSITORY / "README.md").read_text()
    assert len(readme.splitlines()) <= 90
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
