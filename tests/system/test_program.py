"""The program `sdd`: the four scripts and the tools under one name, what it explains, and a chat with a student."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode
from launching import REPOSITORY, Outcome, run
from omegaconf import DictConfig, OmegaConf
from test_addresses import IN_KEY, NOT_IN_KEY

from sdd.cli.explain import explained, first_sentence, options_of
from sdd.cli.influence import Influence
from sdd.cli.loader import config_folder, own_loader
from sdd.cli.program import FETCH, HELP, SCRIPTS, TOOLS, main
from sdd.config.settings import descriptions, keys, setting
from sdd.stages import graph
from sdd.stages.dry_run import planned, summary
from sdd.store import Store
from sdd.study import Study


def program(capsys: pytest.CaptureFixture[str], *words: str) -> Outcome:
    try:
        code = main(list(words))
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return Outcome(code, out, err)


def test_help_is_ten_lines_and_imports_little(tmp_path: Path) -> None:
    listed = (
        "import sys; from sdd.cli.program import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", listed],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{HELP}\n"
    assert len(HELP.splitlines()) <= 10
    assert max(map(len, HELP.splitlines())) <= 120
    assert not {"hydra", "torch", "omegaconf", "numpy"} & set(re.findall(r"'(\w+)'", done.stderr))
    assert {word for line in HELP.splitlines()[1:-1] for word in [line.split()[1]]} <= {*SCRIPTS, FETCH, *TOOLS}


def test_commands_of_the_help_compose() -> None:
    loader = own_loader()
    for line in HELP.splitlines()[1:-1]:
        words = [word for word in line.split() if re.match(r"[a-z_]+=\S", word)]
        for word in words:
            assert loader.load_configuration("config", [word], RunMode.MULTIRUN)


@pytest.mark.parametrize("command", TOOLS)
def test_every_tool_has_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = program(capsys, command, "--help")
    assert outcome.code == 0
    assert outcome.stdout.startswith("usage: ")


def test_script_under_the_program_is_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m sdd prune` from any folder plans what `prune.py` plans."""
    words = ["metric=last", "dry_run=true"]
    own = run("prune", *words, cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "sdd", "prune", *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, own.stdout), done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "sdd has no command trian; did you mean train?"),
        (["pruning=n2"], "pruning=n2 needs a command before it, for example: sdd train pruning=n2"),
        (
            ["explain", "finetune.noise_shar"],
            "finetune.noise_shar is no group or setting; did you mean finetune.noise_share",
        ),
        (["chat", "0123456789abcdef"], "no artifact under"),
    ],
)
def test_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = program(capsys, *words)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


# ---- explain ------------------------------------------------------------------------------------------------------


def test_every_setting_says_what_it_is() -> None:
    texts = descriptions()
    assert [key for key, text in texts.items() if not text and not key.endswith("._target_")] == []
    assert set(texts) == set(keys())
    assert all(len(text) <= 100 and "\n" not in text for text in texts.values())


def test_every_option_says_what_it_is() -> None:
    """In the first line of its file; sizes of a cut and such say it by their values."""
    silent = {
        f"{folder.name}={option}"
        for folder in config_folder().iterdir()
        if folder.is_dir()
        for option, text in options_of(folder.name).items()
        if not text
    }
    assert silent == set()


def test_first_sentence_of_a_file() -> None:
    assert first_sentence("# @package _global_\n# Two lines\n# of one. A second.\nx: 1\n") == "Two lines of one"
    assert first_sentence("# LoRA (arXiv 2106.09685) on e.g. one. Then more\n") == "LoRA (arXiv 2106.09685) on e.g. one"
    assert first_sentence("x: 1\n") == ""


def test_all_groups_are_listed() -> None:
    lines = list(explained(None))
    names = {line.split()[0] for line in lines if line and not line.startswith("more")}
    folders = {path.name for path in config_folder().iterdir() if path.is_dir()} - {"hydra"}
    assert folders <= names
    assert {key for key in keys() if "." not in key} <= names


def test_a_group_and_a_setting() -> None:
    group = "\n".join(explained("pruning"))
    assert "  n2 " in group and "pruning.keep" in group
    assert "the choice changes: pruned, tuned, evaluated" in group
    lines = list(explained("finetune.noise_share"))
    assert lines[1:] == [
        "  must be  a number from 0 to 1",
        "  default  0.0",
        "  it changes: targets, tuned, evaluated",
    ]


FOLLOWED = ("finetune.noise_share", "finetune.ce_share", "seed")


def test_what_a_setting_changes_is_what_addresses_say(tmp_path: Path) -> None:
    """Derived by changing the setting: the first stages of the tables that addresses are tested by are among it."""
    influence = Influence(tmp_path)
    for key in FOLLOWED:
        first = {stage for name, _, stages, _, _ in IN_KEY if name == key for stage in stages}
        assert first and first <= set(influence.of_setting(key)), key
    in_key = {row[0] for row in IN_KEY}
    for key in ("engine.batch_size", "store.missing"):
        assert key not in in_key and any(row[0] == key for row in NOT_IN_KEY)
        assert influence.of_setting(key) == []


def test_types_are_told_in_words() -> None:
    expected = {
        "seed": "a whole number",
        "dry_run": "true or false",
        "dataset.num_rows": "a whole number, or null",
        "pruning.blocks": "a list of whole numbers, or null",
        "merge.weights": "a list of numbers, or null",
        "adapter.targets": "a list of words",
        "dataset.parts.any.weight": "a number",
    }
    assert {key: own.expected for key in expected if (own := setting(key)) is not None} == expected
    assert setting("finetune.nothing") is None and setting("metric.seed") is None


# ---- chat ---------------------------------------------------------------------------------------------------------


def test_chat_answers_every_line_by_teacher_and_student(
    study: Path,
    manifests: dict[str, dict[str, Any]],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(study)
    address, model = manifests["tuned"]["address"], manifests["pruned"]["spec"]["model"]
    lines = "What is 2 + 3?\n\nReverse this list: a b c\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    own = ["--source", f"{model}={checkpoint}", "--max-new-tokens", "4"]
    both = program(capsys, "chat", address, *own)
    assert both.code == 0, both.stderr
    speakers = [line.partition(":")[0] for line in both.lines]
    assert list(dict.fromkeys(speakers)) == ["teacher", "student"]
    assert speakers.count("teacher") >= 2 and speakers[-1] == "student"
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 + 3?\n"))
    alone = program(capsys, "chat", str(checkpoint), "--max-new-tokens", "4")
    assert alone.code == 0, alone.stderr
    first = [line for line in both.lines if line.startswith("teacher")][: len(alone.lines)]
    assert [line.replace("student:", "teacher:") for line in alone.lines] == first


def test_chat_with_what_is_no_model(
    study: Path,
    manifests: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(study)
    outcome = program(capsys, "chat", manifests["scores"]["address"])
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "is no model; name a pruned, tuned or merged artifact" in outcome.stderr


# ---- settings that fit the model ----------------------------------------------------------------------------------

MISFITS = {
    "calibration=tiny": ("prune", "calibration=tiny: made for the embedded model, which Qwen/Qwen3-0.6B is not"),
    "dataset=tiny_math": ("generate", "you probably meant: python generate.py settings=public model=qwen3_0.6b"),
    "evaluation=tiny": ("evaluate", "evaluation=tiny: made for the embedded model"),
    "experiment=demo": ("train", "you probably meant: python train.py experiment=quickstart model=qwen3_0.6b"),
}


@pytest.mark.parametrize("word", MISFITS)
def test_embedded_tasks_of_a_public_model_are_refused(word: str, tmp_path: Path) -> None:
    script, message = MISFITS[word]
    outcome = run(script, "model=qwen3_0.6b", word, "dry_run=true", cwd=tmp_path)
    assert outcome.code == 2
    assert message in outcome.errors[0]


def test_public_model_brings_its_settings_and_others_win() -> None:
    loader = own_loader()

    def composed(*words: str) -> DictConfig:
        return loader.load_configuration("config", list(words), RunMode.RUN)

    public = composed("model=llama3.1_8b_instruct")
    assert (public.dataset.name, public.evaluation.suite, public.calibration.max_length) == (
        "gsm8k",
        "openllm_v1",
        1024,
    )
    assert (public.finetune.learning_rate, public.finetune.precision, public.finetune.max_length) == (
        1e-4,
        "bf16",
        1024,
    )
    typed = composed("model=llama3.1_8b_instruct", "dataset=dolly", "finetune.max_length=99", "engine.max_new_tokens=7")
    assert (typed.dataset.name, typed.finetune.max_length, typed.engine.max_new_tokens) == ("dolly", 99, 7)
    cell = composed("experiment=paper/cell")
    assert (cell.calibration.num_texts, cell.finetune.validation_rows) == (256, 200)
    own = composed("model=./mine")
    assert (own.dataset.name, own.finetune.learning_rate) == ("tiny_math", 1e-3)
    hub = composed("model=somebody/other")
    assert (hub.dataset.name, hub.model.path) == ("gsm8k", "somebody/other")


def test_every_public_model_chooses_the_settings() -> None:
    for path in (config_folder() / "model").glob("*.yaml"):
        node = OmegaConf.load(path)
        chosen = list(node.get("defaults", []))
        is_public = path.stem not in ("tiny", "local")
        assert chosen == ([{"override /settings@_global_.settings": "public"}] if is_public else []), path


def quickstarts() -> dict[str, str]:
    """The words of the header's table, and what it says that they take."""
    text = (config_folder() / "experiment" / "quickstart.yaml").read_text()
    return dict(re.findall(r"^#   (model=.*?) {2,}(about .*)$", text, re.M))


def test_header_of_the_quickstart_is_its_dry_run(tmp_path: Path) -> None:
    loader, table = own_loader(), quickstarts()
    assert len(table) == 4
    for words, takes in table.items():
        config = loader.load_configuration(
            "config", ["experiment=quickstart", "dry_run=true", *words.split()], RunMode.RUN
        )
        study = Study(config, tmp_path)
        wanted = graph.wanted(study, "evaluate")
        assert wanted is not None
        records = [artifact.record() for artifact in planned(wanted, study, Store(tmp_path))]
        assert summary(records) == f"6 artifacts to build: {takes}"


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_more_embedded_rows_than_there_are_is_told_at_once(tmp_path: Path) -> None:
    words = ["dataset=tiny_instruct", "dataset.num_rows=100000000", "dry_run=true"]
    outcome = run("train", *words, cwd=tmp_path)
    assert outcome.code == 2
    assert re.search(
        r"dataset\.num_rows: 100,000,000 of the embedded tasks, but the pool split has [\d,]+ of these families",
        outcome.errors[0],
    )


def test_held_out_rows_shrink_to_a_fifth_with_a_warning(
    tmp_path: Path, composed: Callable[..., DictConfig], caplog: pytest.LogCaptureFixture
) -> None:
    """The key says what is held out: it is the same work as asking for that many."""

    def addresses(held_out: int) -> list[str]:
        config = composed("metric=last")
        config.finetune.validation_rows = held_out
        wanted = graph.wanted(Study(config, tmp_path), "train")
        assert wanted is not None
        (tuned,) = [recipe for recipe in wanted.walk() if recipe.stage == "tuned"]
        assert tuned.spec["finetune"]["validation_rows"] == min(held_out, 28)
        return [recipe.address for recipe in wanted.walk()]

    assert addresses(140) == addresses(29) == addresses(28) != addresses(27)
    assert "finetune.validation_rows=140 is over a fifth of the 140 rows; 28 are held out" in caplog.text
    assert "validation_rows=28 " not in caplog.text
