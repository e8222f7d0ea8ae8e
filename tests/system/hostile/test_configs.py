"""Config files of strangers: an experiment in a folder given with `--config-dir`, all of it tried before anything runs.

The whole table goes through the scripts in this process, as a user would type it; a dry run ends at composition.
"""

import os
from pathlib import Path

import pytest
import yaml
from canaries import Canaries
from launching import run, subprocess_run
from omegaconf import OmegaConf

from sdd.cli.config_files import BoundedFileSource, config_folder
from sdd.config.allowed import check_targets
from sdd.config.shared import check_shared, check_yaml
from sdd.errors import UserError

CREATE = "'\\${oc.create:{_target_:os.mkdir,path:RAN}}'"
REFUSED = {
    "no log": "defaults: [{override /hydra/job_logging: none}]",
    "another log of Hydra's": "defaults: [{override hydra/hydra_logging: colorlog}]",
    "another help": "defaults: ['/hydra/help']",
    # Text that would be resolved a second time.
    "escaped in a callback": "hydra: {callbacks: {x: {_target_: sdd.data.texts.LocalTexts, path: " + CREATE + "}}}",
    "escaped in a setting": "dataset: {system_prompt: " + CREATE + "}",
    "escaped twice": "dataset: {system_prompt: '\\\\\\${oc.env:SDD_SECRET}'}",
    "escaped in a list": "dataset: {leak_phrases: ['\\${oc.env:SDD_SECRET}']}",
    "escaped in a key": "study: {'\\${oc.env:SDD_SECRET}': 1}",
    "escaped by YAML": 'dataset: {system_prompt: "\\x5c\\x24\\x7boc.env:SDD_SECRET}"}',
    "escaped in a student": "merge: {students: [['dataset.system_prompt=\\${oc.env:SDD_SECRET}'], [seed=1]]}",
    # Classes under keys that are not theirs.
    "texts as callback": "hydra: {callbacks: {x: {_target_: sdd.data.texts.LocalTexts, path: x}}}",
    "logger as callback": "hydra: {callbacks: {x: {_target_: pytorch_lightning.loggers.WandbLogger}}}",
    "own callback from a file": "hydra: {callbacks: {x: {_target_: sdd.cli.sweep.SweepEnd}}}",
    "metric as dataset": "dataset: {_target_: sdd.importance.Angular}",
    "dataset as metric": "metric: {_target_: sdd.data.local.LocalRows}",
    "engine as logger": "logger: {_target_: sdd.engines.HFEngine}",
    "logger as metric": "metric: {_target_: pytorch_lightning.loggers.WandbLogger}",
    "callback as engine": "engine: {_target_: sdd.cli.sweep.SweepEnd}",
    "metric within a metric": "metric: {inner: {_target_: sdd.importance.Angular}}",
    "logger in a study": "study: {_target_: pytorch_lightning.loggers.WandbLogger}",
    "mixture within a mixture": "dataset: {parts: {a: {_target_: sdd.data.mixture.Mixture}}}",
    "launcher as sweeper": "hydra: {sweeper: {_target_: hydra_plugins.hydra_joblib_launcher.joblib_launcher.Joblib}}",
    # Where a run writes.
    "run folder": "hydra: {run: {dir: OUTSIDE.d}}",
    "run folder within": "hydra: {run: {dir: outputs/x}}",
    "sweep folder": "hydra: {sweep: {dir: ../elsewhere}}",
    "sweep subfolder": "hydra: {sweep: {subdir: ../../elsewhere}}",
    "output subfolder": "hydra: {output_subdir: ../../elsewhere}",
    "job name": "hydra: {job: {name: ../../elsewhere}}",
    "change of folder": "hydra: {job: {chdir: true}}",
    "log file": "hydra: {job_logging: {handlers: {file: {class: logging.FileHandler, filename: OUTSIDE, mode: w}}}}",
    "log file within": "hydra: {job_logging: {handlers: {file: {class: logging.FileHandler, filename: train.py}}}}",
    "log file of hydra": "hydra: {hydra_logging: {handlers: {f: {class: logging.FileHandler, filename: ../x}}}}",
    "logging by name": "hydra: {job_logging: {root: {handlers: []}}}",
    "artifacts elsewhere": "paths: {artifacts: OUTSIDE.d}",
    "artifacts above": "paths: {artifacts: ../elsewhere}",
    "artifacts above, hidden": "paths: {artifacts: artifacts/../../elsewhere}",
    "artifacts at home": "paths: {artifacts: ~/elsewhere}",
    "artifacts here": "paths: {artifacts: .}",
    "artifacts beside": "paths: {artifacts: sdd}",
    "artifacts composed": "study: {a: ..}\npaths: {artifacts: 'artifacts/${study.a}/${study.a}/x'}",
    "artifacts with a newline": 'paths: {artifacts: "artifacts/a\\nb"}',
    "artifacts as a number": "paths: {artifacts: 3}",
    "another path": "paths: {other: artifacts}",
    "paths as text": "paths: artifacts",
    "artifacts behind a link": "paths: {artifacts: artifacts/link/x}",
    # What hydra is told.
    "search path of a package": "hydra: {searchpath: ['pkg://antigravity']}",
    "search path of a folder": "hydra: {searchpath: ['file:///']}",
    "runtime": "hydra: {runtime: {output_dir: OUTSIDE.d}}",
    "overrides": "hydra: {overrides: {task: [seed=1]}}",
    "help": "hydra: {help: {template: '${hydra:runtime.cwd}'}}",
    "environment of a job": "hydra: {job: {env_set: {PYTHONPATH: /nowhere}}}",
    "environment copied": "hydra: {job: {env_copy: [SDD_SECRET]}}",
    "launcher text": 'hydra: {launcher: {partition: "a\\n#SBATCH --wrap=touch RAN"}}',
    "launcher plain text": "hydra: {launcher: {qos: high}}",
    "launcher setup": "hydra: {launcher: {setup: [touch RAN]}}",
    "launcher expression": 'hydra: {launcher: {pre_dispatch: \'__import__("os").mkdir("RAN")\'}}',
    "launcher folder": "hydra: {launcher: {submitit_folder: OUTSIDE.d}}",
    "launcher mapping": "hydra: {launcher: {additional_parameters: {wrap: touch RAN}}}",
    "sweeper storage": "hydra: {sweeper: {storage: 'sqlite:///OUTSIDE.db'}}",
    "sweeper function": "hydra: {sweeper: {custom_search_space: os.mkdir}}",
    "sampler with text": "hydra: {sweeper: {sampler: {_target_: optuna.samplers.TPESampler, gamma: os.mkdir}}}",
    "hydra as text": "hydra: RUN",
    "hydra as a list": "hydra: [RUN]",
    "unknown mode": "hydra: {mode: SHELL}",
    "verbose with a call": "hydra: {verbose: '${oc.env:SDD_SECRET}'}",
    **{
        f"{number} for {name}": f"hydra: {{{name.replace('.', ': {')}: {number}}}}}"
        for name in ("launcher.n_jobs", "sweeper.max_batch_size")
        for number in ("0", "-2", ".nan", ".inf", "true", "9" * 20)
    },
    "sampler without an end": "hydra: {sweeper: {sampler: {_target_: optuna.samplers.TPESampler, seed: .inf}}}",
    # Who tracks, for whom and where.
    "tracker": "logger: {_target_: pytorch_lightning.loggers.WandbLogger}",
    "tracker of another": "logger: {entity: evil}",
    "tracker online": "logger: {offline: false}",
    "tracker swept": "hydra: {sweeper: {params: {logger: wandb}}}",
    "tracker of another swept": "hydra: {sweeper: {params: {logger.entity: evil}}}",
    "tracker's words from the environment": "logger: {notes: '${oc.env:SDD_SECRET}'}",
    "tracker as a list": "logger: [wandb]",
    # Whose code may run.
    "allowance": "allow: antigravity.x",
    "allowances": "allow: [antigravity.x]",
    "no allowance": "allow: null",
    "allowance swept": "hydra: {sweeper: {params: {allow: antigravity.x}}}",
    # What is swept becomes overrides.
    "swept text that steers": "hydra: {sweeper: {params: {seed: \"'\\e[2J'\"}}}",
    "swept text reversed": 'hydra: {sweeper: {params: {seed: "a\\u202eb"}}}',
    "environment swept": "hydra: {sweeper: {params: {dataset.system_prompt: '${oc.env:SDD_SECRET}'}}}",
    "environment swept, escaped": "hydra: {sweeper: {params: {dataset.system_prompt: '\\${oc.env:SDD_SECRET}'}}}",
    "setting of hydra swept": "hydra: {sweeper: {params: {hydra.run.dir: OUTSIDE.d}}}",
    "callback swept": "hydra: {sweeper: {params: {+hydra.callbacks.x._target_: os.mkdir}}}",
    "paths swept": "hydra: {sweeper: {params: {paths.artifacts: OUTSIDE.d}}}",
    "group of hydra swept": "hydra: {sweeper: {params: {hydra/launcher: joblib}}}",
    "removal swept": "hydra: {sweeper: {params: {~seed: 1}}}",
    "experiment elsewhere swept": "hydra: {sweeper: {params: {experiment: ../../../etc/x}}}",
    "two words swept": "hydra: {sweeper: {params: {'seed=1 hydra.run.dir': x}}}",
    # Resolvers.
    "environment": "dataset: {system_prompt: '${oc.env:SDD_SECRET}'}",
    "environment in a key": "study: {'${oc.env:SDD_SECRET}': 1}",
    "hydra's values": "dataset: {system_prompt: '${hydra:runtime.cwd}'}",
    "typed words": "dataset: {system_prompt: '${hydra:overrides.task}'}",
    "package folder": "dataset: {path: '${package_folder:../..}'}",
    "created": "study: {x: '${oc.create:{_target_:os.mkdir}}'}",
    "decoded": "study: {x: '${oc.decode:1}'}",
    "selected": "study: {x: '${oc.select:seed}'}",
    "time": "study: {x: '${now:%Y}'}",
    "keys": "study: {x: '${oc.dict.keys:model}'}",
    "a resolver by a composed name": "study: {a: env}\ndataset: {system_prompt: '${oc.${study.a}:SDD_SECRET}'}",
    "not an interpolation": "study: {x: '${'}",
    # Defaults lists.
    "defaults above": "defaults: [../../outside]",
    "defaults far above": "defaults: [/experiment/../../../../outside]",
    "defaults of a group above": "defaults: [{/experiment/../../..: outside}]",
    "defaults by the environment": "defaults: [{/metric: '${oc.env:SDD_SECRET}'}]",
    "defaults into hydra": "defaults: [/logger/wandb@hydra.callbacks.x]",
    "defaults into the launcher": "defaults: [/logger/wandb@hydra.launcher]",
    "defaults as a number": "defaults: 5",
    "defaults of lists": "defaults: [[a, b]]",
    # YAML.
    "bomb": "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    ),
    "bomb of merges": "a: &a {x: 1}\n" + "\n".join(f"m{n}: {{<<: [{', '.join(['*a'] * 30000)}]}}" for n in range(2)),
    "alias within itself": "study: &a [*a]",
    "deep": "study: " + "[" * 5000 + "]" * 5000,
    "deep mapping": "study: " + "{a: " * 3000 + "1" + "}" * 3000,
    "deep blocks": "\n".join(" " * n + f"a{n}:" for n in range(1500)),
    "large": "study: {x: " + "a" * (1 << 20) + "}",
    "a long number": "study: {x: " + "9" * 5000 + "}",
    "object": 'study: !!python/object/apply:os.mkdir ["RAN"]',
    "name": "study: !!python/name:os.mkdir",
    "broken": "study: {x: [1, 2}",
    "twice": "seed: 1\nseed: 2",
    "a list": "- 1\n- 2",
    "control characters": "study: {\"\\e[2J\": '${oc.env:SDD_SECRET}'}",
    "not UTF-8": "study: {x: \udce4}",
}


def offer(canaries: Canaries, body: str, name: str = "evil") -> list[str]:
    """Write the experiment; the words that use it."""
    path = canaries.work.parent / "given" / "experiment" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = canaries.fill(body)
    path.write_bytes(b"# @package _global_\n" + text.encode("utf-8", "surrogateescape") + b"\n")
    (path.parents[2] / "outside.yaml").write_text("dataset: {system_prompt: stolen}\n")
    return [f"--config-dir={path.parents[1]}", f"experiment={name}"]


TRACKED = "# @package _global_\ndefaults: [{override /logger: wandb}]"
DOUBLING = {f"e{n}": f"defaults: [e{n + 1}@study.a, e{n + 1}@study.b]" for n in range(20)} | {"e20": "x: 1"}
MANY = "defaults: [" + ", ".join(f"/metric/last@study.x{n}" for n in range(2000)) + "]"
STUDENTS = "merge: {students: [%s, [seed=1]]}"
COMPOSED: dict[str, tuple[str, list[str]]] = {
    # A tracker that nobody asked for would be sent its user's key, and what it tracks.
    "tracker chosen": ("defaults: [{override /logger: wandb}]", []),
    "tracker in its place": ("defaults: [/logger/wandb@logger]", []),
    "tracker chosen by another file": ("defaults: [/experiment/tracked]", []),
    "tracker of a root chosen, its settings typed": (
        "defaults: [{override /logger: wandb}]",
        ["+logger.project=x"],
    ),
    "tracker of a student's experiment": (STUDENTS % "[experiment=tracked]", ["merge=slerp"]),
    # Whose code may run.
    "a class that nobody allowed": ("metric: {_target_: mine.metrics.Middle}", []),
    "an allowance of a student": (STUDENTS % "['allow=antigravity.x']", ["merge=slerp"]),
    "an option in place of allowances": ("defaults: [/pruning/n2@allow]", []),
    "one class allowed, another named": ("metric: {_target_: os.mkdir, path: RAN}", ["allow=json.JSONEncoder"]),
    "a class under a key of another kind": ("engine: {_target_: json.JSONEncoder}", ["allow=json.JSONEncoder"]),
    "a class as callback": (
        "hydra: {callbacks: {x: {_target_: json.JSONEncoder}}}",
        ["allow=json.JSONEncoder"],
    ),
    # Sizes.
    "files without an end": (MANY, []),
    "files that double": ("defaults: [/experiment/e0@study.z]", []),
    "files in a circle": ("defaults: [/experiment/evil]", []),
    "a name of a file without an end": ("defaults: ['" + "a" * 100_000 + "']", []),
    "students without an end": ("merge: {students: [" + "[seed=1], " * 300 + "[]]}", ["merge=linear"]),
    **{
        f"sweep of {choices[:30]}": (f"hydra: {{sweeper: {{params: {{seed: '{choices}'}}}}}}", ["-m"])
        for choices in ("range(0,1000000000)", "range(0,1e300)", "range(0,1,step=1e-9)", "range(0,1,0)", "range(0,nan)",
        "shuffle(range(0,1000000000))", "choice(" + "1," * 11_000 + "1)", "interval(0,1)", "range(0,5", "x", "[1")
    },
    "sweep of products": (
        "hydra: {sweeper: {params: {seed: 'range(0,300)', dataset.seed: 'range(0,300)', finetune.epochs: '1,2'}}}",
        ["-m"],
    ),
    **{
        f"{value[:20]} for {key}": (f"{key.replace('.', ': {')}: {value}{'}' * key.count('.')}", [])
        for key, value in (
            *(("seed", value) for value in ("9" * 30, ".nan", "1e400", "4294967296")),
            *(("finetune.learning_rate", value) for value in (".nan", "1e400")),
            *(("finetune.epochs", "1000000000"), ("finetune.batch_size", "9" * 30), ("adapter.rank", "1000000000")),
            *(("evaluation.limit", "1000000000"), ("evaluation.seed", "9" * 30), ("trainer.threads", "1000000000")),
            *(("pruning.blocks", "[.nan]"), ("pruning.multiple", "9" * 30), ("analysis.draft_lengths", "[.inf]")),
            *(("model.shape", "{hidden_size: .inf}"), ("study.x", "[{a: .nan}]"), ("merge.t", ".nan")),
            *(("dataset.num_rows", "9" * 30), ("calibration.max_length", "9" * 30), ("finetune", "null")),
        )
    },
    # Texts and paths.
    "half a character": ('dataset: {system_prompt: "a\\ud800"}', []),
    "half a character in a list": ('dataset: {leak_phrases: ["\\udfff"]}', []),
    "half a character in a key": ('study: {"\\ud800": 1}', []),
    "a path at nobody's home": ("defaults: [{override /model: local}]\nmodel: {path: ~nosuchuser/x}", []),
    "rows at nobody's home": ("defaults: [{override /dataset: local}]\ndataset: {path: ~nosuchuser/x}", []),
    "texts at nobody's home": ("defaults: [{override /calibration: local}]\ncalibration: {path: ~nosuchuser/x}", []),
    "a path without an end": ("defaults: [{override /model: local}]\nmodel: {path: " + "a" * 5000 + "}", []),
    "a repository above": ("defaults: [{override /dataset: gsm8k}]\ndataset: {hub: {repository: ../../x}}", []),
    # What Hydra itself refuses.
    "an unknown key": ("launcher: 1", []),
    "an unknown setting of the launcher": ("hydra: {launcher: {foo: 1}}", []),
    "an option that steers": ('defaults: [{/metric@study.x: "\\e[2J"}]', []),
    "an option reversed": ('defaults: [{override /metric: "\\u202elast"}]', []),
    "an option twice": ("defaults: [{/metric: last}, {/metric: last}]", []),
    "an override of nothing": ("defaults: [{override /nothing: x}]", []),
    "no metric": ("defaults: [{override /metric: null}]", []),
    "itself twice": ("defaults: [_self_, _self_]", []),
    # Students.
    "a student without a setting": (STUDENTS % "[~seed]", ["merge=slerp"]),
    "a student of a long number": (STUDENTS % f"['seed={'9' * 5000}']", ["merge=slerp"]),
    "a student that is swept": (STUDENTS % "['seed=range(0,1000000000)']", ["merge=slerp"]),
    "a student that is none": (STUDENTS % "[x]", ["merge=slerp"]),
}  # fmt: skip
"""Files that are looked at together with others: each goes through a script."""


@pytest.mark.parametrize("name", COMPOSED)
def test_what_is_composed_is_refused(name: str, canaries: Canaries) -> None:
    body, typed = COMPOSED[name]
    words = offer(canaries, body)
    for other, text in ({"tracked": TRACKED} | DOUBLING).items():
        (canaries.work.parent / "given" / "experiment" / f"{other}.yaml").write_text(text)
    typed = sorted([*words, *typed, "dry_run=true"], key=lambda word: not word.startswith("-"))
    outcome = run("evaluate", *typed, cwd=canaries.work)
    canaries.check_refused(outcome)
    assert len(outcome.stderr) < 3_000


@pytest.mark.parametrize("typed", [[], ["logger=wandb"], ["logger=wandb", "logger.offline=true"]], ids=len)
def test_a_tracker_that_is_asked_for_gets_the_words_of_a_file(typed: list[str], canaries: Canaries) -> None:
    words = offer(canaries, "logger: {project: x, tags: [a], notes: 'b'}")
    outcome = run("train", *words, *typed, "dry_run=true", cwd=canaries.work)
    assert outcome.code == 0, outcome.stderr


TYPED = {name: body for n, (name, body) in enumerate(REFUSED.items()) if n % 4 == 0 or "defaults" in name}
"""Cases that go through a script as a user would type it; the others through the same checks without Hydra around."""


@pytest.fixture
def linked(canaries: Canaries, monkeypatch: pytest.MonkeyPatch) -> Canaries:
    """The working folder, with a link out of its artifacts."""
    (canaries.work / "artifacts").mkdir()
    (canaries.work / "artifacts" / "link").symlink_to(canaries.work.parent)
    monkeypatch.chdir(canaries.work)
    return canaries


@pytest.mark.parametrize("body", TYPED.values(), ids=TYPED.keys())
def test_shared_config_is_refused(body: str, linked: Canaries) -> None:
    words = [*offer(linked, body), "dry_run=true", "merge=slerp" if "students" in body else "seed=0"]
    before = set(linked.work.parent.iterdir())
    linked.check_refused(run("prune", *words, cwd=linked.work))
    assert set(linked.work.parent.iterdir()) == before


@pytest.mark.parametrize(
    "body", [b for n, b in REFUSED.items() if n not in TYPED], ids=[n for n in REFUSED if n not in TYPED]
)
def test_shared_file_is_refused(body: str, linked: Canaries) -> None:
    option, _ = offer(linked, body)
    with pytest.raises(UserError) as refusal:
        found = BoundedFileSource("command-line", option.partition("=")[2]).load_config("experiment/evil")
        check_shared(OmegaConf.to_container(found.config, resolve=False), "experiment/evil.yaml")
        check_targets(found.config)
    linked.check(str(refusal.value))


@pytest.mark.parametrize("kind", ["escaped in a callback", "environment swept", "paths swept", "log file", "bomb"])
def test_nothing_of_a_sweep_starts(kind: str, canaries: Canaries) -> None:
    outcome = run("prune", "-m", *offer(canaries, REFUSED[kind]), "dry_run=true", cwd=canaries.work)
    canaries.check_refused(outcome)
    assert not (canaries.work / "outputs").exists()


@pytest.mark.parametrize("kind", ["environment", "run folder", "escaped in a setting", "artifacts above"])
def test_experiment_of_a_student_is_a_file_too(kind: str, canaries: Canaries) -> None:
    folder, choice = offer(canaries, REFUSED[kind])
    students = f"merge.students=[[{choice}],[seed=1]]"
    canaries.check_refused(run("evaluate", folder, "merge=slerp", students, "dry_run=true", cwd=canaries.work))


def test_file_in_place_of_the_root_is_shared(canaries: Canaries) -> None:
    folder = canaries.work.parent / "root"
    folder.mkdir()
    for body in ("hydra: {searchpath: ['pkg://antigravity']}", "hydra: {run: {dir: x}}", "a: ${oc.env:SDD_SECRET}"):
        (folder / "config.yaml").write_text(body)
        canaries.check_refused(run("prune", "-cp", str(folder), cwd=canaries.work))


def test_own_groups_cannot_be_replaced_by_a_shared_folder(canaries: Canaries) -> None:
    """What lies under the name of a group of ours is read from ours; what is new there is a shared file."""
    words = offer(canaries, "seed: 3")
    folder = canaries.work.parent / "given" / "metric"
    folder.mkdir()
    (folder / "angular.yaml").write_text("_target_: os.mkdir")
    (folder / "mine.yaml").write_text("_target_: os.mkdir\npath: x")
    assert run("prune", *words, "dry_run=true", cwd=canaries.work).code == 0
    canaries.check_refused(run("prune", *words, "metric=mine", "dry_run=true", cwd=canaries.work))


@pytest.mark.parametrize("place", ["pipe", "link", "folder", "large"])
def test_file_that_is_none_is_refused(place: str, canaries: Canaries) -> None:
    words = offer(canaries, "seed: 3")
    path = canaries.work.parent / "given" / "experiment" / "evil.yaml"
    path.unlink()
    if place == "pipe":
        os.mkfifo(path)
    elif place == "link":
        path.symlink_to(canaries.outside)
    elif place == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"#" * (1 << 21))
    canaries.check_refused(run("prune", *words, cwd=canaries.work))


@pytest.mark.parametrize("path", ["pkg://antigravity", "pkg://os", "structured://x"])
def test_search_path_names_folders(path: str, canaries: Canaries) -> None:
    canaries.check_refused(run("prune", f"hydra.searchpath=[{path}]", cwd=canaries.work))


@pytest.mark.parametrize("word", ["hydra.launcher.partition", "hydra.launcher.qos", "hydra.launcher.account"])
def test_newline_does_not_reach_a_batch_script(word: str, canaries: Canaries) -> None:
    typed = [f'+{word}="a\n#SBATCH --wrap=x"', "seed=1"]
    canaries.check_refused(run("prune", "-m", *typed, cwd=canaries.work))


def test_stream_put_together_from_two_settings_imports_nothing(canaries: Canaries) -> None:
    body = "study: {a: 'ext:', b: '//antigravity'}\n"
    body += "hydra: {job_logging: {handlers: {console: {stream: '${study.a}${study.b}'}}}}"
    canaries.check_refused(run("prune", *offer(canaries, body), cwd=canaries.work))
    typed = [
        "+study.a=ext:",
        "+study.b=//antigravity",
        "hydra.job_logging.handlers.console.stream=${study.a}${study.b}",
    ]
    canaries.check_refused(run("prune", *typed, cwd=canaries.work))


def test_two_harmless_halves_are_not_resolved_together(canaries: Canaries) -> None:
    """Text that becomes an interpolation only when it is put together stays text, or is refused."""
    body = "study: {a: '$', b: '{oc.env:SDD_SECRET}'}\ndataset: {system_prompt: '${study.a}${study.b}'}"
    outcome = run("generate", *offer(canaries, body), "dry_run=true", cwd=canaries.work)
    canaries.check(outcome.stdout + outcome.stderr)
    body = "study: {a: '$', b: '{oc.env:SDD_SECRET}'}\n"
    body += "merge: {students: [['dataset.system_prompt=${study.a}${study.b}'], [seed=1]]}"
    outcome = run("evaluate", *offer(canaries, body), "merge=slerp", "dry_run=true", cwd=canaries.work)
    canaries.check_refused(outcome)


@pytest.mark.process
def test_workers_of_a_sweep_check_too(canaries: Canaries) -> None:
    """A process of its own, as joblib's: the sweep's parameter chooses the hostile file."""
    folder, choice = offer(canaries, REFUSED["environment"])
    words = [folder, "-m", choice + ",null", "dry_run=true", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    code = "import sys; from sdd.cli import app; sys.argv = ['prune', *sys.argv[1:]]; app.main('prune')"
    outcome = subprocess_run(["-c", code, *words], canaries.work)
    assert outcome.code == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    canaries.check(outcome.stderr)


@pytest.mark.parametrize("path", sorted((config_folder() / "experiment").rglob("*.yaml")), ids=lambda p: p.stem)
def test_own_experiments_obey_the_rules(path: Path) -> None:
    check_yaml(path.read_text(), path.name)
    check_shared(yaml.safe_load(path.read_text()), path.name)


def test_what_a_file_may_say() -> None:
    body = """
seed: 3
study: {rates: {sft: 1e-3}, name: "price $5 {x}"}
finetune: {learning_rate: "${study.rates.${finetune.mode}}"}
paths: {artifacts: artifacts/shared}
hydra:
  mode: MULTIRUN
  verbose: [sdd.cli.app]
  launcher: {n_jobs: 2, timeout_min: 60, cpus_per_task: null}
  sweeper: {n_trials: 3, direction: minimize, params: {metric: "angular,last", "metric@width_metric": sdm, seed: 1}}
"""
    check_shared(yaml.safe_load(body), "mine")
    with pytest.raises(UserError, match=r"hydra\.mode"):
        check_shared({"hydra": {"mode": "OTHER"}}, "mine")
