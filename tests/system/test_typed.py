"""What people type: mistakes in one line with the nearest names, paths without quotes, models by hub id or folder."""

import importlib.util
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from launching import REPOSITORY, run
from omegaconf import DictConfig
from safetensors import safe_open

from sdd.cli.loader import CheckedConfigLoader, config_folder, own_loader
from sdd.cli.mistakes import Composition
from sdd.cli.words import arranged, chosen
from sdd.config import check_values
from sdd.errors import UserError
from sdd.stages import graph
from sdd.study import Study
from sdd.study.keeping import blocks_to_remove

MISTAKES = {
    "finetune=self-distill": "finetune has no option self-distill; did you mean self_distill?",
    "finetune=lora": "finetune has no option lora; choose one of corrected, dac_kl, gold, hidden_states, jsd, "
    "logit_distill, none, on_policy, redi, relations, reverse_kl, self_distill, ... (17 in all)",
    "hydra/launcher=submitit_slurm": "submitit_slurm needs the package hydra-submitit-launcher; run: pip ",
    "trainer=cuda": "trainer has no option cuda; choose one of cpu, ddp, fsdp, gpu",
    "model=llama3.1_8b": "model has no option llama3.1_8b; did you mean llama3.1_8b_instruct",
    "model=mymodel": "or name a hub id (organisation/name) or a folder (./name)",
    "dataset=Gsm8k": "dataset has no option Gsm8k; did you mean gsm8k?",
    "dataset=openai/gsm8k": "dataset has no option openai/gsm8k; did you mean gsm8k?",
    "dataset=rows.jsonl": "did you mean dataset=local dataset.path=rows.jsonl?",
    "calibration=./texts.parquet": "did you mean calibration=local calibration.path=./texts.parquet?",
    "experiment=main_table": "experiment has no option main_table; did you mean paper/main_table?",
    "experiment=paper": "experiment has no option paper; choose one of paper/adapters, ",
    "metric@width_metric=sdmm": "metric has no option sdmm; did you mean sdm?",
    "hydra/launcher=jobblib": "hydra/launcher has no option jobblib; did you mean joblib?",
    "pruning=true": "pruning has no option True",
    "prunning=n2": "prunning is not a setting; did you mean pruning?",
    "finetune.learning_rat=1": "finetune.learning_rat is not a setting; did you mean finetune.learning_rate?",
    "finetune.lr=1e-4": "finetune.lr is not a setting; did you mean finetune.learning_rate?",
    "lr=1e-4": "lr is not a setting; did you mean finetune.learning_rate?",
    "size=2": "size is not a setting; did you mean pruning.size?",
    "engine.temprature=1": "engine.temprature is not a setting; did you mean engine.temperature?",
    "dataset.hub.revison=x": "dataset.hub.revison is not a setting; did you mean dataset.hub.revision?",
    "finetun.epochs=1": "finetun.epochs is not a setting; did you mean finetune.epochs?",
    "finetune.xyz=1": "finetune.xyz is not a setting; choose from finetune.mode, ",
    "seed.x=1": "seed.x is not a setting; seed holds a value of its own",
    "finetune.epochs=1.5": "finetune.epochs=1.5 must be a whole number",
    "finetune.learning_rate=fast": "finetune.learning_rate=fast must be a number",
    "dry_run=perhaps": "dry_run=perhaps must be true or false",
    "dataset.num_rows=10k": "dataset.num_rows=10k must be a whole number, or null",
    "pruning.blocks=3": "pruning.blocks=3 must be a list of whole numbers, or null: pruning.blocks=[3]",
    "pruning.blocks=[1,x]": "pruning.blocks=[1,x] must be a list of whole numbers, or null",
    "adapter.targets=q_proj": "adapter.targets=q_proj must be a list of words: adapter.targets=[q_proj]",
    "seed=": "seed= must be a whole number",
    "'finetune={epoch: 3}'": "finetune.epoch is not a setting; did you mean finetune.epochs?",
    "pruning.size=1,2": "pruning.size=1,2 names several values; add -m to run each of them",
    "evaluation.tasks=sort,word": "add -m to run each of them, or write one list: evaluation.tasks=[sort,word]",
    "+pruning=n3": "+pruning=n3: an option of pruning is chosen already; write pruning=n3",
    "hydra.launcher.n_jobs=2": "hydra.launcher.n_jobs is not a setting of the chosen hydra/launcher",
    "seed=range(0,3)": "seed=range(0,3) names several values; add -m",
    "pruning:n2": "pruning:n2 is not a setting; write key=value without spaces, for example pruning=n2",
    "'pruning =n2'": "no space may stand before the equals sign; write pruning=n2",
    "'finetune={mode: sft'": "{ and } do not match",
    "adapter.targets=[q_proj,k_proj": "[ and ] do not match",
    "'seed=range(3'": "( and ) do not match",
    "pruning=n2,": "a value is missing beside a comma",
    "metric.by=it\\'s": "a quote is not closed",
    "metric.by=a=b": "metric.by=a=b cannot be read; put the value in quotes within quotes",
}
OF_SWEEPS = {
    "pruning=n2,n99": "pruning has no option n99; did you mean n9?",
    "finetune.epoch=1,2": "finetune.epoch is not a setting; did you mean finetune.epochs?",
    "pruning.size=1,many": "pruning.size=many must be a whole number",
    "seed=0..3": "seed=0..3 must be a whole number",
}


@pytest.fixture(scope="module")
def loader() -> CheckedConfigLoader:
    return own_loader()


@pytest.fixture(scope="module")
def mistake(loader: CheckedConfigLoader) -> Callable[[str, bool], str | None]:
    """What is wrong with a word beside the defaults; a config is composed once for each choice of options."""
    made: dict[tuple[str, ...], DictConfig] = {}

    def composed(words: list[str]) -> DictConfig:
        if tuple(words) not in made:
            made[tuple(words)] = loader.load_configuration("config", words, RunMode.MULTIRUN)
        return made[tuple(words)].copy()

    def function(word: str, is_sweep: bool) -> str | None:
        groups = loader.repository.group_exists
        return Composition(groups, loader.options, composed, is_sweep).mistake(shlex.split(word))

    return function


@pytest.mark.parametrize("word", MISTAKES)
def test_mistake_has_one_line(word: str, mistake: Callable[[str, bool], str | None]) -> None:
    if "submitit" in word and importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher"):
        pytest.skip("hydra-submitit-launcher is installed")
    line = mistake(word, False)
    assert line is not None and MISTAKES[word] in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("word", OF_SWEEPS)
def test_mistake_in_a_sweep_has_one_line(word: str, mistake: Callable[[str, bool], str | None]) -> None:
    line = mistake(word, True)
    assert line is not None and OF_SWEEPS[word] in line


def test_what_is_right_is_no_mistake(mistake: Callable[[str, bool], str | None]) -> None:
    right = [
        "finetune=sft",
        "experiment=paper/cell",
        "pruning.blocks=[1,2]",
        "hydra/launcher=joblib",
        "seed=3",
        "~teacher",
    ]
    assert [
        mistake(word, False) for word in [*right, "+study.x=1", "dataset.num_rows=null", "model.dtype=float16"]
    ] == [None] * 9
    assert mistake("pruning=n2,n3 seed=range(0,3)", True) is None


FLAGS = {
    "--dryrun": "--dryrun is no flag; settings are written without dashes: dry_run=true",
    "--pruning=n2": "--pruning=n2 is no flag; settings are written without dashes: pruning=n2",
    "--muultirun": "--muultirun is no flag; did you mean --multirun?",
    "-x": "-x is no flag; choose one of --help, ",
    "--cfg=jbo": "invalid choice: 'jbo'",
    "-m --cfg=job": "--multirun and --cfg exclude each other; keep one",
    "--resolve": "--resolve goes with --cfg",
}


@pytest.mark.parametrize("words", FLAGS)
def test_flag_that_is_none(words: str) -> None:
    with pytest.raises(UserError) as error:
        arranged(words.split())
    assert FLAGS[words] in str(error.value)


TEXTS = {
    "model.path=~/models/mine": "~/models/mine",
    "model.path=/data/a=b/mine": "/data/a=b/mine",
    "model.path=/data/mine (1)": "/data/mine (1)",
    "model.path=/data/a,b": "/data/a,b",
    "model.path=C:\\models\\mine": "C:\\models\\mine",
    "dataset.path=it's.jsonl": "it's.jsonl",
    "teacher.path=~/t{1}": "~/t{1}",
    "paths.artifacts=[x]": "[x]",
    "evaluation.data_dir='quoted, already'": "quoted, already",
    "dataset.template={prompt}": "{prompt}",
    "dataset.parts.a.path=~/a": "~/a",
    "dataset.system_prompt=What's 1+1=?": "What's 1+1=?",
}


@pytest.mark.parametrize("word", TEXTS)
def test_text_needs_no_quotes(word: str) -> None:
    (arranged_word,) = arranged([word])
    assert OverridesParser.create().parse_override(arranged_word).value() == TEXTS[word]


def test_texts_of_a_sweep_are_quoted_one_by_one() -> None:
    flag, word = arranged(["model.path=~/a,./b,'c,d'", "-m"])
    override = OverridesParser.create().parse_override(word)
    assert flag == "-m"
    assert [str(value) for value in override.sweep_string_iterator()] == ["'~/a'", "./b", "'c,d'"]


def test_flags_may_stand_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    words = ["seed=1", "--config-dir", str(folder), "-m", "pruning=n2,n3"]
    assert arranged(words) == ["--config-dir", str(folder), "-m", "seed=1", "pruning=n2,n3"]


MODELS = {
    "model=meta-llama/Llama-3.1-8B-Instruct": ["model=llama3.1_8b_instruct"],
    "model=llama3.1_8b_instruct": ["model=llama3.1_8b_instruct"],
    "model=somebody/other": ["settings=public", "model=local", "model.path='somebody/other'"],
    "model=./mine": ["model=local", "model.path='./mine'"],
    "model='~/models/mine'": ["model=local", "model.path='~/models/mine'"],
    "model=/abs/mine": ["model=local", "model.path='/abs/mine'"],
    "model=mine": ["model=mine"],
    "model=tiny,a/b": ["model=tiny,a/b"],
    "teacher=./big": ["teacher.path='./big'"],
    "teacher=qwen3_8b": [
        "teacher.path='Qwen/Qwen3-8B'",
        "teacher.revision=b968826d9c46dd6066d109eabc6255188de91218",
    ],
    "teacher=google/gemma-3-270m-it": ["teacher.path='google/gemma-3-270m-it'", "teacher.revision=main"],
    "pruning=0.8": ["pruning=none", "pruning.keep=0.8"],
    "pruning.keep=0.8": ["pruning=none", "pruning.keep=0.8"],
}


@pytest.mark.parametrize("word", MODELS)
def test_names_of_models_and_shares(word: str, loader: CheckedConfigLoader) -> None:
    is_option = set(loader.options("model")).__contains__
    assert chosen([word], is_option, config_folder() / "model") == MODELS[word]


def test_an_option_of_ones_own_is_no_hub_id() -> None:
    assert chosen(["model=org/mine"], {"org/mine"}.__contains__, config_folder() / "model") == ["model=org/mine"]


def test_hub_id_and_folder_compose(loader: CheckedConfigLoader) -> None:
    def path(*words: str) -> tuple[str, str | None]:
        config = loader.load_configuration("config", arranged(list(words)), RunMode.RUN)
        return config.model.path, config.model.revision

    assert path("model=Qwen/Qwen3-8B") == path("model=qwen3_8b")
    assert path("model=~/a b") == ("~/a b", None)


def test_model_of_a_sweep_is_a_folder_as_it_is(tmp_path: Path) -> None:
    teacher = REPOSITORY / "sdd" / "tiny" / "teacher"
    (tmp_path / "mine").symlink_to(teacher)
    words = [
        "-m",
        f"model=tiny,./mine,{teacher}",
        "finetune=none",
        "metric=last",
        "dry_run=true",
        "model.dtype=float32",
    ]
    outcome = run("train", *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert len({line.split()[3] for line in outcome.lines if " pruned/" in line}) <= 1
    assert len([line for line in outcome.lines if " pruned/" in line]) == 3


# ---- a share to keep ----------------------------------------------------------------------------------------------


def addresses(loader: CheckedConfigLoader, memory: Path, *words: str) -> list[str]:
    config = loader.load_configuration("config", ["dataset.num_rows=120", *words], RunMode.RUN)
    del config.hydra
    check_values(config)
    wanted = graph.wanted(Study(config, memory), "train")
    assert wanted is not None
    return [recipe.address for recipe in wanted.walk()]


@pytest.mark.parametrize(("share", "size"), [("0.8", 2), ("1.0", 0)])
def test_share_to_keep_is_the_same_work_as_the_number_of_blocks(
    share: str, size: int, loader: CheckedConfigLoader, tmp_path: Path
) -> None:
    own = addresses(loader, tmp_path, f"pruning.size={size}")
    assert addresses(loader, tmp_path, f"pruning={share}") == own
    assert addresses(loader, tmp_path, f"pruning.keep={share}") == own


def test_share_is_of_all_parameters_that_are_there() -> None:
    """The formula against the embedded model's own tensors: the smallest student with at least that share."""
    folder = REPOSITORY / "sdd" / "tiny" / "teacher"
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "numpy") as file:
        counts = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    whole = sum(counts.values())
    block = sum(count for name, count in counts.items() if ".layers.0." in name)
    for share in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 1.0):
        removed = blocks_to_remove(share, config)
        last = removed == config["num_hidden_layers"] - 1
        assert (whole - removed * block) / whole >= share or last
        assert last or (whole - (removed + 1) * block) / whole < share


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pruning=none", "pruning.keep=0"], "pruning.keep=0 must be above 0 and at most 1"),
        (["pruning=80"], "pruning.keep=80 must be above 0 and at most 1"),
        (["pruning=n2", "pruning.keep=0.8"], "pruning.keep=0.8 and pruning.size=2 both say how much goes"),
        (["pruning.keep=0.8", "pruning.ratio=0.1"], "pruning.keep=0.8 and pruning.ratio=0.1 both say"),
    ],
)
def test_share_that_cannot_be_kept(words: list[str], message: str, loader: CheckedConfigLoader, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        addresses(loader, tmp_path, *words)
