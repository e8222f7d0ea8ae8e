"""What manifests say of the job that built an artifact: enough to repeat it, nothing of the machine or its owner."""

import pytest

from sdd.config.provenance import command, provenance, shareable

CONFIG = {
    "model": {"path": "/home/somebody/models/mine", "dtype": "bfloat16"},
    "engine": {"max_new_tokens": 128, "api_key": "hunter2", "token": "hf_x"},
    "dataset": {"template": "/no_think {prompt}", "path": "../data/rows.jsonl", "families": ["a", "/b/c"]},
    "logger": {"entity": "somebody"},
    "paths": {"artifacts": "/scratch/somebody"},
    "seed": 0,
}


def test_config_keeps_what_decides_the_work() -> None:
    kept = provenance("train", [], CONFIG)["config"]
    assert kept["model"] == {"path": ".../mine", "dtype": "bfloat16"}
    assert kept["engine"] == {"max_new_tokens": 128}
    assert kept["dataset"] == {
        "template": "/no_think {prompt}",
        "path": "../data/rows.jsonl",
        "families": ["a", ".../c"],
    }
    assert set(kept) == {"model", "engine", "dataset", "seed"}


def test_command_can_be_pasted() -> None:
    overrides = ["experiment=paper/cell", "adapter.targets=[q_proj,v_proj]", "+engine.api_key=hunter2"]
    overrides += [
        "model.path=~/models/mine",
        "paths.artifacts=/scratch",
        "hydra.run.dir=/tmp/x",
        "logger=wandb",
        "seed=1",
    ]
    assert command("evaluate", overrides) == (
        "python evaluate.py experiment=paper/cell 'adapter.targets=[q_proj,v_proj]' model.path=.../mine seed=1"
    )


@pytest.mark.parametrize(
    ("value", "shared"),
    [
        ("/etc/passwd", ".../passwd"),
        ("'/a b/c d'", ".../c d"),
        ("C:\\models\\x/y", ".../y"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("a /b/c", "a .../c"),
        (3, 3),
        (None, None),
    ],
)
def test_only_absolute_paths_are_cut(value: object, shared: object) -> None:
    assert shareable(value) == shared
