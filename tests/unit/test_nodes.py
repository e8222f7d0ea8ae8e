"""Commands of several machines: what the environment says of them, what they tell each other, and their common end."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sdd.errors import UserError
from sdd.forward import nodes
from sdd.forward.nodes import Elsewhere, Nodes, Place, free_port, place, together

GIVEN = {"MASTER_ADDR": "gpu1", "MASTER_PORT": "29500", "NODE_RANK": "1"}
SLURM = {"SLURM_NODEID": "1", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_ID": "1234567"}
SLURM |= {"SLURM_JOB_NODELIST": "gpu[5-6]", "SLURM_NTASKS_PER_NODE": "1"}
TORCHRUN = {"MASTER_ADDR": "gpu1", "MASTER_PORT": "29500", "GROUP_RANK": "1", "RANK": "1", "LOCAL_RANK": "0"}
TORCHRUN |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (GIVEN, ("gpu1", 29500)),
        (GIVEN | {"WORLD_SIZE": "8"}, ("gpu1", 29500)),
        (SLURM, ("gpu5", 19567)),
        (SLURM | {"MASTER_ADDR": "ib5", "MASTER_PORT": "29500"}, ("ib5", 29500)),
        (TORCHRUN, ("gpu1", 29501)),
    ],
)
def test_the_environment_says_which_node_this_is(environment: dict[str, str], expected: tuple[str, int]) -> None:
    assert place(2, 4, environment) == Place(*expected, node=1, nodes=2, devices=4)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "MASTER_ADDR is missing here"),
        ({**GIVEN, "MASTER_PORT": ""}, "MASTER_PORT is missing here"),
        ({**GIVEN, "NODE_RANK": "2"}, "NODE_RANK=2, but trainer.num_nodes=2: the last node is 1"),
        ({**GIVEN, "NODE_RANK": "-1"}, "NODE_RANK=-1 is no whole number"),
        ({**GIVEN, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        ({**GIVEN, "WORLD_SIZE": "3"}, "WORLD_SIZE=3, but trainer.num_nodes=2 and trainer.devices=4"),
        ({**SLURM, "SLURM_NTASKS": "8"}, "SLURM_NTASKS=8, but trainer.num_nodes=2, with one task a node"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, "one command a machine"),
    ],
)
def test_what_the_environment_lacks_is_one_line(environment: dict[str, str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        place(2, 4, environment)


def _explained(error: BaseException) -> tuple[int, str]:
    return (error.code, str(error)) if isinstance(error, Elsewhere) else (1, f"why: {error}")


def _each(works: list[Callable[[Nodes], Any]], **differing: int) -> list[Any]:
    """What the work of each node comes to, or its error; `differing` is what the last one says otherwise."""
    port, results = free_port(), [None] * len(works)

    def one(node: int) -> None:
        said = {"node": node, "nodes": len(works), "devices": 1} | (differing if node == len(works) - 1 else {})
        try:
            with together(Place("localhost", port, **said), _explained) as met:
                results[node] = works[node](met)
        except Exception as error:
            results[node] = error

    threads = [threading.Thread(target=one, args=(node,)) for node in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def _first(met: Nodes) -> str:
    met.agree("tuned/a", ["b"])
    met.begin("b")
    met.finish()
    return f"b {met.port}"


def _other(met: Nodes) -> str:
    assert met.agree("tuned/a", []) == ["b"]
    seen = []
    for stage in met.stages():
        seen.append(f"{stage} {met.port}")
        met.finish()
    return " ".join(seen)


def _fails(met: Nodes) -> None:
    raise ValueError("no room")


def test_all_hear_what_the_first_begins_until_it_ends() -> None:
    one, *others = _each([_first, _other, _other])
    assert one.startswith("b ") and others == [one, one]


@pytest.mark.parametrize("works", [[_fails, _other, _other], [_first, _fails, _other]], ids=["first", "another"])
def test_what_ends_one_ends_all_with_its_code_and_reason(works: list[Callable[[Nodes], Any]]) -> None:
    errors = _each(works)
    assert {type(error) for error in errors} == {ValueError, Elsewhere}
    assert {(error.code, str(error)) for error in errors if isinstance(error, Elsewhere)} == {(1, "why: no room")}


def test_nodes_that_are_at_other_jobs_or_say_the_same_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = [str(error) for error in _each([_first, lambda met: met.agree("tuned/z", [])])]
    assert ended[0] == f"why: {ended[1]}" and ended[1].startswith("node 1 is asked for tuned/z, and node 0 for tuned/a")
    for works, differing, line in (
        ([_first, _other, _other], {"node": 1}, "two commands say NODE_RANK=1"),
        ([_first, _other], {"devices": 2}, "trainer.devices=2, node 0"),
    ):
        errors = _each(works, **differing)
        assert all(isinstance(error, UserError) and line in str(error) for error in errors), errors
    monkeypatch.setattr(nodes, "COMING", 0.2)
    for node, line in ((0, "node 1 did not come"), (1, "node 0 was not met")):
        with pytest.raises(UserError, match=line), together(Place("localhost", free_port(), node, 2, 1), _explained):
            pass
