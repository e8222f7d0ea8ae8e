"""What is typed, or resolved on the way, and must not be in a manifest: credentials of any name, places.

And what must: every setting that the project's own groups have, so that a manifest still says what was done.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from canaries import SECRET
from launching import REPOSITORY, artifacts_of, run

from sdd.config.provenance import OPEN, command, is_secret, provenance, shareable

TOKEN = "q8Zk3VtR0mXw7LbN5yHs2JdF9gPc1AeT"

TYPED = [
    *("engine.api_key", "+engine.hfToken", "engine.credential", "engine.bearer", "engine.auth", "engine.passphrase"),
    *("+metric.PASSWORD", "metric.client-secret", "metric.session", "+engine.note", "engine.x.y", "++engine.seed.deep"),
    *(
        "model.shape.api_key",
        "model.shape.accessKey",
        "model.hfToken",
        "+model.token",
        "study.password",
        "study.hf_token",
    ),
    *("+study.sshKey", "dataset.fields.token", "dataset.fields.note", "+dataset.parts.gsm8k.auth", "trainer.cookie"),
    *("logger.api_key", "hydra.job.env_set.HF_TOKEN", "paths.secret", "+anything", "+analysis.prompts.fields.secret"),
    *("merge.password", "merge.token", "repair.bearer", "evaluation.Authorization", "adapter.privateKey"),
]


@pytest.mark.parametrize("key", TYPED)
def test_settings_that_are_not_the_projects_are_left_out(key: str) -> None:
    """Typed under a key of its own, repeated in a value that is kept, and in a student's overrides."""
    words = [f"{key}={SECRET}", f"dataset.name={key}-{SECRET}", f"merge.students=[['{key}={SECRET}'],['seed=1']]"]
    name, *inner = key.lstrip("+~").split(".")
    node: Any = SECRET
    for part in reversed(inner):
        node = {part: node}
    config = {"dataset": {"name": f"{key}-{SECRET}"}, "seed": 1}
    config |= {"merge": {"students": [[f"{key}={SECRET}"], ["seed=1"]]}}
    config[name] = {**config[name], **node} if isinstance(config.get(name), dict) and isinstance(node, dict) else node
    made = provenance("train", words, config)
    assert SECRET not in json.dumps(made)
    assert made["config"]["merge"]["students"][1] == ["seed=1"]


@pytest.mark.parametrize(
    "value",
    [
        "hf_abcdefghijklmnop",
        "text with sk-proj-abcdefghij in it",
        "ghp_0123456789abcdef0123",
        "[github_pat_11ABCDEFG0abcdef,other]",
        "AKIAIOSFODNN7EXAMPLE",
        "xoxb-1234567890-abcdef",
        "glpat-abcdefghijklmnopqrst",
        TOKEN,
        f"x={TOKEN}==",
        "0123456789abcdef" * 2 + "deadbeef",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
        "https://me:hunter22@host/x",
        "https://hunter22@github.com/x",
        "https://host/x?token=hunter22&y=1",
        "{api_key: hunter22}",
        '{"password": "hunter22 and more"}',
        "Authorization: Bearer hunter22",
        "a: 1, hfToken=hunter22",
        "engine.credential=hunter22",
    ],
)
def test_credentials_within_values_are_left_out(value: str) -> None:
    shared = json.dumps([shareable(value), shareable({"a": [value]}), command("train", [f"dataset.template={value}"])])
    for part in ("hunter22", "abcdefghij", "0123456789", "IOSFODNN7", "1234567890", TOKEN, "ABCDEFG0", "c2lnbmF0"):
        assert part not in shared, shared


@pytest.mark.parametrize(
    ("value", "shared"),
    [
        ("[/a/b,/c/d]", "[.../b,.../d]"),
        ("{x: /a/b}", "{x: .../b}"),
        ("[{x: '/a b/c d'}]", "[{x: '.../c d'}]"),
        ("prefix-/a/b/c.jsonl", "prefix-.../c.jsonl"),
        ("file:///home/me/rows.jsonl", ".../rows.jsonl"),
        ("see file:///home/me/rows.jsonl", "see .../rows.jsonl"),
        ("~/models/mine", ".../mine"),
        ("x=~someone/mine", "x=.../mine"),
        ("[~/a/b]", "[.../b]"),
        ("D:/data/mine", ".../mine"),
        ("x C:\\Users\\me\\rows", "x .../rows"),
        ("\\\\server\\share\\rows", ".../rows"),
        ("//server/share/rows", ".../rows"),
        ("from:/b/c", "from:.../c"),
        ("one\n/two/three\nfour", "one\n.../three\nfour"),
        (f"in {Path.home()}/x/y here", "in .../y here"),
        (f"word{REPOSITORY}/sdd", "word..."),
        (f"{{prompt}}{Path.home()}", "{prompt}..."),
        ("https://host/a/b", "https://host/a/b"),
        ("/no_think {prompt}", "/no_think {prompt}"),
        ("{prompt}/{reference}", "{prompt}/{reference}"),
        ("yes/no, and/or, 3/4", "yes/no, and/or, 3/4"),
        ("token: {prompt} author: x max_tokens=4", "token: {prompt} author: x max_tokens=4"),
        ("data/train-00000-of-00001-a1b2c3d4e5f60718.parquet", "data/train-00000-of-00001-a1b2c3d4e5f60718.parquet"),
        ("meta-llama/Llama-3.1-8B-Instruct-With-A-Long-Name", "meta-llama/Llama-3.1-8B-Instruct-With-A-Long-Name"),
    ],
)
def test_places_are_cut_wherever_they_stand(value: str, shared: str) -> None:
    assert shareable(value) == shared


def test_what_a_command_has_to_say_is_kept() -> None:
    commit = "b53048f856ff4f594e959d75785d2c2d37b678ee"
    words = ["experiment=paper/cell", "pruning=n4", "metric@width_metric=taylor_width", "~dataset@dataset.parts.dolly"]
    words += ["+dataset@dataset.parts.alpaca=alpaca", "+dataset@analysis.prompts=gsm8k", f"model.revision={commit}"]
    words += ["dataset.parts.gsm8k.weight=3", "dataset.fields={prompt: question}", "study.rank=r4", "merge.t.mlp=0.5"]
    words += ["engine.max_new_tokens=4", "metric.depth=3", "study.rank=r4,r16", "dataset.hub.revision=main", "seed=1"]
    assert command("train", words) == shlex.join(["python", "train.py", *words])


def test_every_setting_of_the_projects_groups_is_kept() -> None:
    """All but where a server is: the machine of whoever ran it, which nobody else may send rows to unasked."""
    for node in OPEN:
        for file in (REPOSITORY / "conf" / node.removeprefix("width_")).glob("*.yaml"):
            settings = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name != "defaults"}
            if "base_url" in settings:
                settings["base_url"] = "http://10.0.0.7:8000/v1"
            kept = {name: value for name, value in settings.items() if name != "base_url"}
            assert provenance("train", [], {node: settings})["config"][node] == kept, file
    typed = provenance("generate", ["engine=openai", "engine.base_url=http://10.0.0.7:8000/v1"], {})
    assert typed["command"] == "python generate.py engine=openai"
    for file in (REPOSITORY / "conf" / "model").glob("*.yaml"):
        settings = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name != "defaults"}
        model = settings | {"path": "owner/name"}
        assert provenance("train", [], {"model": model})["config"]["model"] == model, file


def test_names_of_credentials() -> None:
    for name in (
        "token",
        "hfToken",
        "HF_TOKEN",
        "api_key",
        "apikey",
        "APIKey",
        "a.credential",
        "client-secret",
        "auth",
    ):
        assert is_secret(name), name
    for name in ("max_new_tokens", "author", "tokenizer", "micro_batch_tokens", "key", "keys", "secretary", "bears"):
        assert not is_secret(name), name


def test_manifests_of_a_run_hold_nothing_that_was_typed(small: list[str], tmp_path: Path) -> None:
    words = [*small, "metric=last", f"+study.hfToken={SECRET}", f"+study.where={tmp_path}/my/data"]
    words += [f"+model.shape.api_key={SECRET}", "dataset.system_prompt='${study.where} ${study.hfToken}'"]
    outcome = run("prune", *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    text = json.dumps(artifacts_of(tmp_path / "artifacts"))
    assert "pruning" in text
    assert SECRET not in text
    assert str(tmp_path) not in text
