"""Imports point downwards only, and the layers that compute know nothing of Hydra or of artifacts."""

import ast
from collections.abc import Iterator
from pathlib import Path

from launching import REPOSITORY

LAYERS = (
    {"errors", "answers", "untrusted"},
    {"store", "architectures"},
    {"models"},
    {"forward"},
    {"finetuning"},
    {"config", "tiny"},
    {"data", "pruning", "rewriting", "evaluation", "merging", "planning", "importance", "analysis"},
    {"study"},
    {"stages"},
    {"report", "export"},
    {"cli"},
    {"api"},
    {"share"},
    {"__main__"},
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
COMPUTING = ("architectures", "models", "tiny", "forward", "finetuning", *LAYERS[6])
DIGESTS = {"digest_of", "file_digest", "remembered_digest", "canonical", "HashedFile", "CHUNK"}
"""What the computing layers may take from the store's room: functions of bytes, nothing of artifacts."""

MODULES = sorted((REPOSITORY / "sdd").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(REPOSITORY / "sdd").with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name taken from it) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def rooms_used(path: Path) -> set[str]:
    found = set()
    for module, name in imports(path):
        if module == "sdd":
            found.add(name)
        elif module.startswith("sdd."):
            found.add(module.split(".")[1])
    return found - {room_of(path)}


def computing() -> list[Path]:
    return [path for path in MODULES if room_of(path) in COMPUTING]


def test_a_room_is_a_folder() -> None:
    """Few files lie beside the rooms."""
    assert len(list((REPOSITORY / "sdd").glob("*.py"))) <= 6


def test_every_room_has_a_layer() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__"} <= set(LAYER)
    assert len(MODULES) > 30


def test_imports_point_downwards() -> None:
    upwards = [
        f"{path.relative_to(REPOSITORY)} (layer {LAYER[room_of(path)]}) imports {room} (layer {LAYER[room]})"
        for path in MODULES
        for room in rooms_used(path) & set(LAYER)
        if LAYER[room] > LAYER[room_of(path)]
    ]
    assert upwards == []


def test_rooms_of_a_layer_do_not_import_each_other_in_a_circle() -> None:
    uses = {room: set() for room in LAYER}
    for path in MODULES:
        if room_of(path) in uses:
            uses[room_of(path)] |= rooms_used(path) & set(LAYER)
    reached = dict(uses)
    for _ in LAYER:
        reached = {room: found.union(*(reached[other] for other in found)) for room, found in reached.items()}
    assert [room for room, found in reached.items() if room in found] == []


def test_computing_layers_know_nothing_of_hydra() -> None:
    for path in computing():
        assert not {module.split(".")[0] for module, _ in imports(path)} & {"hydra", "omegaconf"}, path


def test_computing_layers_know_nothing_of_artifacts() -> None:
    for path in computing():
        taken = {name for module, name in imports(path) if module.split(".")[:2] == ["sdd", "store"]}
        assert taken <= DIGESTS, path


def test_store_knows_nothing_of_what_it_stores() -> None:
    for path in (REPOSITORY / "sdd" / "store").glob("*.py"):
        assert rooms_used(path) <= {"errors", "untrusted"}, path


def test_names_become_classes_in_one_place() -> None:
    """Hydra's own ways from a name to an object are not used."""
    for path in MODULES:
        assert not {name for _, name in imports(path)} & {"instantiate", "get_object", "get_class", "get_method"}, path


def test_lightning_is_imported_under_one_name() -> None:
    for path in MODULES:
        assert "lightning" not in {module.split(".")[0] for module, _ in imports(path)}, path
