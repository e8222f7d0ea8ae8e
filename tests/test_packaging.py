"""What is said in several places must agree: dependencies, the lock, the environment for conda, the scripts."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


def test_conda_environment_is_in_step_with_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    by_pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert by_pip == [*DECLARED, "-e ."]
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


def test_lock_pins_everything_exactly_and_satisfies_pyproject() -> None:
    lines = (ROOT / "requirements.lock").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in lines)
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for declared in map(Requirement, DECLARED):
        version = pinned[canonicalize_name(declared.name)]
        assert declared.specifier.contains(version), f"{declared} is locked at {version}"


def test_what_builds_the_project_is_locked() -> None:
    """The project is installed editable, by what is in the environment: nothing is fetched beside the lock."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    lines = (ROOT / "requirements.lock").read_text().split()
    assert set(build) <= set(lines)
    assert {line.partition("==")[0] for line in lines} >= {"editables", "packaging", "pathspec", "pluggy"}
    assert "--no-build-isolation --no-deps" in (ROOT / "Makefile").read_text()


def test_entry_scripts_are_thin_and_match_the_console_scripts() -> None:
    names = ["prune", "generate", "train", "evaluate"]
    own = {f"sdd-{name}": f"sdd.cli.app:{name}" for name in names}
    assert PROJECT["scripts"] == {"sdd": "sdd.cli.program:main", **own}
    for name in names:
        assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 40
