"""Somebody else's config, checkpoint or command line is data: nothing in it is run, and nothing secret is written."""

import contextlib
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import Outcome, run
from omegaconf import OmegaConf

from sdd.config.allowed import build, check_targets
from sdd.errors import UserError

PAYLOAD = "{_target_: os.system, command: touch MARKER}"
FACTORY = "{'()': os.system, command: touch MARKER}"

CONFIGS = {
    "metric": "metric: " + PAYLOAD,
    "engine": "engine: " + PAYLOAD,
    "logger": "logger: " + PAYLOAD,
    "dataset": "dataset: {_target_: os.system}",
    "calibration": "calibration: {_target_: os.system}",
    "below a part": "logger: {_target_: pytorch_lightning.loggers.WandbLogger, settings: " + PAYLOAD + "}",
    "in a list": "study: {parts: [[" + PAYLOAD + "]]}",
    "callback": "hydra: {callbacks: {evil: " + PAYLOAD + "}}",
    "callback of another library": "hydra: {callbacks: {evil: {_target_: os.mkdir, path: MARKER}}}",
    "launcher": "hydra: {launcher: {_target_: os.getcwd}}",
    "sweeper": "hydra: {sweeper: {_target_: os.getcwd}}",
    "a part as launcher": "hydra: {launcher: {_target_: sdd.cli.sweep.SweepEnd}}",
    "list as target": "hydra: {callbacks: {evil: {_target_: [os.mkdir], path: MARKER}}}",
    "list as handler": "hydra: {job_logging: {handlers: {console: {'()': [os.mkdir], path: MARKER}}}}",
    "alias": "metric: {_target_: sdd.store.store.os.system, command: touch MARKER}",
    "alias in a callback": "hydra: {callbacks: {evil: {_target_: sdd.store.store.os.mkdir, path: MARKER}}}",
    "alias of a module": "hydra: {callbacks: {evil: {_target_: sdd.cli.app.contextlib.os.mkdir, path: MARKER}}}",
    "handler ()": "hydra: {job_logging: {handlers: {console: " + FACTORY + "}}}",
    "handler class": "hydra: {job_logging: {handlers: {console: {class: os.system, command: touch MARKER}}}}",
    "formatter ()": "hydra: {job_logging: {formatters: {simple: " + FACTORY + "}}}",
    "filter ()": "hydra: {job_logging: {filters: {evil: " + FACTORY + "}}}",
    "hydra handler ()": "hydra: {hydra_logging: {handlers: {console: " + FACTORY + "}}}",
    "hydra handler class": "hydra: {hydra_logging: {handlers: {console: {class: os.mkdir, path: MARKER}}}}",
    "stream": "hydra: {job_logging: {handlers: {console: {stream: ext://antigravity}}}}",
    "composed stream": "study: {a: 'ext:'}\nhydra: {job_logging: {handlers: {console: {stream: '${study.a}//this'}}}}",
    "interpolated target": "study: {name: os.system}\nmetric: {_target_: '${study.name}', command: touch MARKER}",
    "interpolated callback": "study: {name: os.mkdir}\n"
    "hydra: {callbacks: {evil: {_target_: '${study.name}', path: MARKER}}}",
    "node as callback": "study: {evil: {_partial_: false}}\nhydra: {callbacks: {evil: '${study.evil}'}}",
    "node as handlers": "study: {evil: {x: {'()': os.mkdir, path: MARKER}}}\n"
    "hydra: {job_logging: {handlers: '${study.evil}'}}",
    "node chosen by the job": "study: {prune: {}}\nhydra: {callbacks: {evil: '${study.${hydra.job.name}}'}}",
    "dotted key": "hydra: {callbacks: {a.b: {_target_: os.mkdir, path: MARKER},\n"
    "  a: {b: {_target_: sdd.cli.sweep.SweepEnd}}}}",
    "created node": "hydra: {callbacks: {evil: '${oc.create:{_target_:os.mkdir,path:MARKER}}'}}",
    "decoded node": "hydra: {callbacks: {evil: '${oc.decode:\"{_target_: os.mkdir, path: MARKER}\"}'}}",
    "node by resolver": "hydra: {callbacks: {evil: '${hydra:launcher}'}}",
    "environment": "dataset: {system_prompt: '${oc.env:SDD_SECRET}'}",
    "environment with a default": "dataset: {system_prompt: '${oc.env:SDD_SECRET,none}'}",
    "environment behind a tab": 'dataset: {system_prompt: "${\\toc.env:SDD_SECRET}"}',
    "environment by a composed name": "study: {a: oc.env}\ndataset: {system_prompt: '${${study.a}:SDD_SECRET}'}",
    "environment by half a name": "study: {a: env}\ndataset: {system_prompt: '${oc.${study.a}:SDD_SECRET}'}",
    "environment in a folder": "hydra: {run: {dir: 'outputs/${oc.env:SDD_SECRET}'}}",
    "environment copied": "hydra: {job: {env_copy: [SDD_SECRET]}}",
    "environment set": "hydra: {job: {env_set: {PATH: /nowhere}}}",
    "yaml tag": 'study: !!python/object/apply:os.system ["touch MARKER"]',
}


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SDD_SECRET", "s3cr3t-value")
    return "s3cr3t-value"


def offered(folder: Path, body: str, name: str = "evil") -> tuple[Path, str]:
    """Write a config folder with one experiment; the file its payload would create, and the option to use it."""
    marker = folder / "ran"
    path = folder / "given" / "experiment" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# @package _global_\n" + body.replace("MARKER", str(marker)) + "\n")
    return marker, f"--config-dir={folder / 'given'}"


def assert_refused(outcome: Outcome, marker: Path, folder: Path, secret: str) -> None:
    assert not marker.exists()
    assert outcome.code != 0
    assert outcome.stdout == ""
    assert not (folder / "artifacts").exists()
    assert secret not in outcome.stdout + outcome.stderr
    written = [path for path in (folder / "outputs").rglob("*") if path.is_file()]
    assert not any(secret in path.read_text() for path in written)


@pytest.mark.parametrize("body", CONFIGS.values(), ids=CONFIGS.keys())
def test_experiment_file_is_refused(body: str, tmp_path: Path, secret: str) -> None:
    marker, folder = offered(tmp_path, body)
    outcome = run("prune", folder, "experiment=evil", "dry_run=true", cwd=tmp_path)
    assert_refused(outcome, marker, tmp_path, secret)
    if "!!python" not in body:
        assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.stderr
        assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("kind", ["metric", "callback", "handler ()", "node as handlers", "environment", "dotted key"])
def test_experiment_file_is_refused_within_a_sweep(kind: str, tmp_path: Path, secret: str) -> None:
    """Before the first job, the harmless one, is started."""
    marker, folder = offered(tmp_path, CONFIGS[kind])
    offered(tmp_path, "seed: 1", "good")
    outcome = run("prune", folder, "-m", "experiment=good,evil", "dry_run=true", cwd=tmp_path)
    assert_refused(outcome, marker, tmp_path, secret)
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.stderr


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("optuna.samplers.TPESampler", True),
        ("optuna.samplers._base.os.system", False),
        ("optuna.samplers.Sampler.os", False),
        ("os.system", False),
    ],
)
def test_sampler_of_a_sweeper(name: str, allowed: bool) -> None:
    config = OmegaConf.create({"hydra": {"sweeper": {"sampler": {"_target_": name}}}})
    with contextlib.nullcontext() if allowed else pytest.raises(UserError, match="refused"):
        check_targets(config)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system"},
        {"_target_": "sdd.store.store.os.system"},
        {"_target_": "sdd.rewriting.engines.Request"},
        {"_target_": "sdd.rewriting.engines.HFEngine"},
    ],
)
def test_nothing_else_is_built(node: dict) -> None:
    with pytest.raises(UserError, match="refused"):
        build(node)


@pytest.mark.parametrize(
    "words",
    [
        ["metric._target_=os.system", "+metric.command=touch MARKER"],
        ["engine={_target_:os.system,command:touch MARKER}"],
        ["+logger._target_=os.system", "+logger.command=touch MARKER"],
        ["dataset._target_=os.system"],
        ["calibration._target_=os.system"],
        ["+hydra.callbacks.evil={_target_:os.mkdir,path:MARKER}"],
        ["hydra.launcher._target_=os.system"],
        ["hydra.job_logging.handlers.console.class=os.system"],
        ["+hydra.job_logging.handlers.evil={'()':os.mkdir,path:MARKER}"],
        ["dataset.system_prompt=${oc.env:SDD_SECRET}"],
    ],
    ids=lambda words: words[0].split("=")[0],
)
def test_override_is_refused(words: list[str], tmp_path: Path, secret: str) -> None:
    words = [word.replace("MARKER", str(tmp_path / "ran")) for word in words]
    outcome = run("evaluate", *words, cwd=tmp_path)
    assert_refused(outcome, tmp_path / "ran", tmp_path, secret)
    assert outcome.code in (1, 2)


def test_refusal_names_the_setting(tmp_path: Path) -> None:
    outcome = run("prune", "metric._target_=os.system", cwd=tmp_path)
    assert outcome.errors == ["error: metric._target_=os.system is not one of this project's parts; refused"]


@pytest.mark.parametrize("mode", [["--cfg", "job"], ["--cfg", "all", "--resolve"], ["--info", "all"]], ids=" ".join)
def test_looking_at_a_config_runs_nothing(mode: list[str], tmp_path: Path, secret: str) -> None:
    marker, folder = offered(tmp_path, CONFIGS["callback of another library"])
    outcome = run("prune", folder, *mode, "experiment=evil", cwd=tmp_path)
    assert not marker.exists()
    assert outcome.code == 2


@pytest.mark.parametrize("word", ["--experimental-rerun", "--experimental", "--exp", "--e"])
@pytest.mark.parametrize("joined", [True, False])
def test_rerun_from_a_pickle_is_refused_in_every_spelling(word: str, joined: bool, tmp_path: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "job.pickle").write_bytes(pickle.dumps(Payload()))
    words = [f"{word}={tmp_path / 'job.pickle'}"] if joined else [word, str(tmp_path / "job.pickle")]
    outcome = run("prune", *words, cwd=tmp_path)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert not (tmp_path / "ran").exists()


def test_plain_interpolations_of_a_file_and_typed_logging_still_work(tmp_path: Path) -> None:
    body = """
study: {rates: {none: 1e-3, sft: 2e-3}, where: mine}
finetune: {learning_rate: "${study.rates.${finetune.mode}}"}
hydra: {verbose: false, launcher: {n_jobs: 2}, sweeper: {params: {seed: "0,1"}}}
defaults: [override /hydra/launcher: joblib]
"""
    _, folder = offered(tmp_path, body, "mine")
    handler = "{class:logging.FileHandler,formatter:simple,filename:'${hydra.runtime.output_dir}/extra.log'}"
    typed = ["hydra.run.dir=mine/here", f"+hydra.job_logging.handlers.extra={handler}"]
    typed.append("hydra.job_logging.root.handlers=[console,extra]")
    outcome = run("prune", folder, *typed, "experiment=mine", "dry_run=true", "finetune=sft", cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "mine" / "here" / "extra.log").is_file()


def _copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def _remote_model(folder: Path, payload: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"}, "model_type": "other"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(payload)


def _remote_tokenizer(folder: Path, payload: str) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}, "tokenizer_class": "Other"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(payload)


def _pickled(folder: Path, payload: str) -> None:
    import torch
    from safetensors.torch import load_file

    class Payload:
        def __reduce__(self) -> tuple:
            return exec, (payload,)

    torch.save({**load_file(folder / "model.safetensors"), "evil": Payload()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _adapter(folder: Path, payload: str) -> None:
    """transformers would follow this file to another checkpoint than the one whose digest is in the key."""
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    _pickled(other, payload)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(other), "r": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


def _remote_attention(folder: Path, payload: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernel"}))


@pytest.mark.parametrize("harm", [_remote_model, _pickled, _adapter, _remote_attention], ids=lambda f: f.__name__)
def test_checkpoint_that_brings_code_is_refused(harm, checkpoint: Path, tmp_path: Path, small: list[str]) -> None:
    folder = _copy(checkpoint, tmp_path)
    harm(folder, f"from pathlib import Path; Path({str(tmp_path / 'ran')!r}).touch()")
    outcome = run("prune", *small, f"model.path={folder}", cwd=tmp_path)
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
    assert str(folder) in outcome.errors[0]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "artifacts").exists()


def test_tokenizer_that_brings_code_does_not_run_it(checkpoint: Path, tmp_path: Path, small: list[str]) -> None:
    folder = _copy(checkpoint, tmp_path)
    _remote_tokenizer(folder, f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Tokenizer: ...")
    run("prune", *small, f"model.path={folder}", cwd=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_template_of_a_tokenizer_is_sandboxed(checkpoint: Path, tmp_path: Path, small: list[str]) -> None:
    folder = _copy(checkpoint, tmp_path)
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
    (folder / "chat_template.jinja").write_text(reach.replace("MARKER", str(tmp_path / "ran")))
    outcome = run("generate", *small, f"model.path={folder}", "dataset.num_rows=8", cwd=tmp_path)
    assert outcome.code != 0
    assert not (tmp_path / "ran").exists()


def test_dataset_rows_are_text(tmp_path: Path, small: list[str]) -> None:
    """Braces, dollars and template words of a row stay what they are."""
    marker = tmp_path / "ran"
    nasty = f"${{oc.env:HOME}} {{reference}} {{{{ 7*7 }}}} $(touch {marker}) `touch {marker}` {{prompt}}"
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": nasty, "reference": f"{n} {nasty}"}) + "\n" for n in range(6))
    words = [*small, "dataset=local", f"dataset.path={tmp_path / 'rows.jsonl.gz'}", "dataset.num_rows=null"]
    outcome = run("generate", *words, "finetune=sft", cwd=tmp_path)
    rows = [json.loads(line) for line in (outcome.path / "train.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [nasty] * 6
    assert [row["target"] for row in rows] == [f"{n} {nasty}" for n in range(6)]
    assert not marker.exists()


def test_hub_is_not_asked(
    study: Path, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Saving an adapter whose base is named by address must not look that address up on the network."""

    def refused(*words: Any, **named: Any) -> None:
        raise SystemExit(f"the network was asked: {words}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)
    shutil.copytree(study / "artifacts", tmp_path / "artifacts")
    outcome = run("train", *small, "seed=5", "finetune=sft", cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    said = outcome.stderr + " ".join(str(warning.message) for warning in recwarn)
    assert "Unable to fetch" not in said
    assert "will assume that the vocabulary" not in said
