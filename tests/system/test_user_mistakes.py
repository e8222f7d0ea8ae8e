"""A mistake of the user ends before any work: one line on stderr, exit code 2, and nothing in the artifacts folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from launching import Outcome, job, run
from omegaconf import DictConfig, OmegaConf

FEW = ["finetune.validation_rows=0", "finetune.num_rows=null"]
BAD = {
    "all blocks": ("prune", ["pruning.size=4"], "pruning.size=4 removes all 4 blocks; choose at most 3"),
    "more than all": ("prune", ["pruning.size=5"], "pruning.size=5 is more than the 4 blocks; choose at most 3"),
    "negative size": ("prune", ["pruning.size=-1"], "pruning.size=-1 must be an integer of at least 0"),
    "start too late": ("prune", ["pruning=n2", "pruning.start=3"], "choose 0 to 2"),
    "start negative": ("prune", ["pruning=n2", "pruning.start=-1"], "choose 0 to 2"),
    "start alone": ("prune", ["pruning=none", "pruning.start=1"], "pruning.start needs pruning.size"),
    "no such block": ("prune", ["pruning.blocks=[1,4]"], "no block 4; the model has blocks 0 to 3"),
    "negative block": ("prune", ["pruning.blocks=[-1]"], "no block -1"),
    "block twice": ("prune", ["pruning.blocks=[1,1]"], "names a block twice"),
    "every block": ("prune", ["pruning.blocks=[0,1,2,3]"], "removes all 4 blocks"),
    "blocks and start": ("prune", ["pruning.blocks=[1]", "pruning.start=0"], "exclude each other"),
    "too many rows": ("train", ["finetune.num_rows=137"], "finetune.num_rows=137, but 136 rows"),
    "no such loss": ("train", ["finetune.loss=klx"], "finetune.loss=klx is unknown; choose one of cross_entropy, "),
    "loss without weight": ("train", ["finetune.loss={jsd: 0}"], "finetune.loss.jsd=0 must be above 0"),
    "a list of losses": ("train", ["finetune.loss=[jsd]"], "finetune.loss=['jsd'] must be the name of a loss, or"),
    "cache of targets": (
        "train",
        ["finetune=on_policy", "finetune.cached=top_k"],
        "finetune.cached=top_k keeps what the teacher says of targets",
    ),
    "no such cache": ("train", ["finetune.cached=all"], "finetune.cached=all is unknown; choose top_k or sampled"),
    "odd bits": ("train", ["finetune.cached_bits=12"], "finetune.cached_bits=12 is unknown; choose 8, 16 or 32"),
    "states from a cache": (
        "train",
        ["finetune=relations", "finetune.cached=top_k"],
        "finetune.loss=relations needs its states; leave finetune.cached out",
    ),
    "drawn for another loss": (
        "train",
        ["finetune=jsd", "finetune.cached=sampled"],
        "with finetune.loss=jsd choose finetune.cached=top_k",
    ),
    "two shares": ("train", ["finetune.loss=jsd", "finetune.ce_share=0.5"], "finetune.ce_share=0.5 goes with a mode's"),
    "nothing rejected": ("train", ["finetune=sft", "finetune.loss=redi"], "rejected rewrites, which finetune=sft has"),
    "all accepted": ("train", ["finetune=redi", "finetune.select=false"], "finetune.select=false rejects none"),
    "negative rate": ("train", ["finetune.learning_rate=-1e-3"], "finetune.learning_rate=-0.001 must be positive"),
    "no rate": ("train", ["finetune.learning_rate=0"], "must be positive"),
    "rate not a number": ("train", ["finetune.learning_rate=nan"], "finetune.learning_rate=nan must be"),
    "infinite rate": ("train", ["finetune.learning_rate=inf"], "finetune.learning_rate=inf must be"),
    "negative decay": ("train", ["finetune.weight_decay=-1"], "finetune.weight_decay=-1.0 must"),
    "no clipping norm": ("train", ["finetune.clip_norm=0"], "finetune.clip_norm=0.0 must"),
    "no epochs": ("train", ["finetune.epochs=0"], "finetune.epochs=0 must be an integer of at least 1"),
    "share over one": ("train", ["finetune.gold_share=1.5"], "finetune.gold_share=1.5 must lie between 0 and 1"),
    "precision": ("train", ["finetune.precision=16"], "finetune.precision=16 is unknown; choose one of 32, bf16"),
    "mode": ("train", ["finetune.mode=sfd"], "finetune.mode=sfd is unknown"),
    "adapter target": ("train", ["adapter.targets=[q_prj]"], "adapter.targets: no linear layer q_prj"),
    "one adapter target": ("train", ["adapter.targets=[q_proj,nope]"], "adapter.targets: no linear layer nope"),
    "no adapter target": ("train", ["adapter.targets=[]"], "adapter.targets"),
    "adapter method": ("train", ["adapter.method=ia3"], "adapter.method=ia3 is unknown; choose one of lora, head_and"),
    "scope": ("train", ["adapter.scope=first"], "adapter.scope=first is unknown; choose one of all, beside_cut, last"),
    "beside no cut": ("train", ["adapter=lora_beside_cut", "pruning=none"], "adapter.scope=beside_cut needs a cut"),
    "more than the last": ("train", ["adapter=lora_last", "adapter.blocks=3"], "more than the student's 2 blocks"),
    "bits": ("train", ["adapter.quantisation=int3"], "adapter.quantisation=int3 is unknown; choose nf4, or null"),
    "all in four bits": (
        "train",
        ["adapter=full", "adapter.quantisation=nf4"],
        "adapter.quantisation=nf4 goes with LoRA",
    ),
    "some of the head": (
        "train",
        ["adapter=head_and_norms", "adapter.scope=last"],
        "adapter.scope=last goes with LoRA",
    ),
    "repair of no cut": ("prune", ["pruning=none", "repair=ridge"], "repair=ridge refits what is before"),
    "repair method": ("prune", ["repair.method=lasso"], "repair.method=lasso is unknown; choose one of none, ridge"),
    "no penalty": ("prune", ["repair=ridge", "repair.penalty=0"], "repair.penalty=0.0 must be positive and finite"),
    "repair of a cut at the beginning": (
        "prune",
        ["repair=ridge", "pruning.start=0"],
        "nothing is before block 0; choose a cut that begins later",
    ),
    "neither a number nor auto": (
        "train",
        ["trainer.micro_batch_tokens=most"],
        "trainer.micro_batch_tokens=most must be an integer of at least 1, or auto",
    ),
    "draws that follow the passes": (
        "train",
        ["trainer.micro_batch_tokens=auto", "adapter.dropout=0.1"],
        "trainer.micro_batch_tokens=auto: with adapter.dropout=0.1 draws follow the passes",
    ),
    "rank": ("train", ["adapter.rank=0"], "adapter.rank=0 must be an integer of at least 1"),
    "tries without sampling": ("generate", ["engine.tries=3"], "engine.tries > 1 needs sampling"),
    "negative temperature": ("generate", ["engine.temperature=-1"], "engine.temperature=-1 must"),
    "temperature in words": ("generate", ["engine.temperature=hot"], "engine.temperature=hot must"),
    "top-p over one": ("generate", ["engine.temperature=1", "engine.top_p=1.5"], "engine.top_p=1.5 must lie between"),
    "half a token": ("generate", ["engine.max_new_tokens=1.5"], "engine.max_new_tokens=1.5 must be an integer"),
    "engine seed in words": ("generate", ["engine.seed=x"], "engine.seed=x must be an integer"),
    "metric seed in words": ("prune", ["metric=random", "metric.seed=x"], "metric.seed=x must be an integer"),
    "metric switch in words": (
        "prune",
        ["metric=block_influence", "metric.contiguous=maybe"],
        "metric.contiguous=maybe must be true or false",
    ),
    "another measure": (
        "prune",
        ["metric=iterative", "metric.by=accuracy"],
        "metric.by=accuracy is unknown; choose one of angular, perplexity, task",
    ),
    "beyond what is measured": (
        "prune",
        ["metric=greedy", "metric.depth=1", "pruning=n2"],
        "pruning.size=2, but metric.depth=1 removals are measured; raise metric.depth",
    ),
    "no depth": ("prune", ["metric=greedy", "metric.depth=0"], "metric.depth=0 must be an integer of at least 1"),
    "texts in words": ("prune", ["metric=taylor", "metric.num_texts=x"], "metric.num_texts=x must be an integer"),
    "switch of a control": (
        "prune",
        ["metric=last_keep_final", "metric.keep_final=1"],
        "metric.keep_final=1 must be true or false",
    ),
    "ratio of one": ("prune", ["metric=sdm", "pruning.ratio=1.0"], "pruning.ratio=1 must lie between 0 and 1"),
    "ratio of nothing": ("prune", ["metric=sdm", "pruning.ratio=0.0"], "pruning.ratio=0 must lie between 0 and 1"),
    "ratio of what": ("prune", ["pruning=mlp20", "pruning.ratio_of=heads"], "pruning.ratio_of=heads is unknown"),
    "alpha over one": ("prune", ["metric=sdm", "pruning=mlp20", "metric.alpha=2"], "metric.alpha=2 must lie between"),
    "no temperature": (
        "prune",
        ["metric=sdm", "pruning=mlp20", "metric.temperature=0"],
        "metric.temperature=0 must lie between",
    ),
    "more than the MLPs hold": (
        "prune",
        ["metric=sdm", "pruning=mlp20", "pruning.ratio=0.9"],
        "pruning.ratio=0.9 of all parameters is more than the MLPs hold (",
    ),
    "no channel left": (
        "prune",
        ["metric=random_width", "pruning=mlp20", "pruning.ratio_of=mlp", "pruning.ratio=0.99"],
        "pruning.ratio=0.99 of mlp parameters leaves no channel of 48",
    ),
    "width metric, depth pruning": (
        "prune",
        ["metric=sdm"],
        "metric=sdm scores MLP channels, but pruning.size=2 removes blocks",
    ),
    "depth metric, width pruning": (
        "prune",
        ["pruning=mlp20"],
        "metric=angular scores blocks, but pruning.ratio=0.2 removes MLP channels",
    ),
    "depth and width with one metric": (
        "prune",
        ["pruning.ratio=0.2"],
        "pruning.size=2 and pruning.ratio=0.2 need a criterion each",
    ),
    "width metric for nothing": ("prune", ["metric@width_metric=sdm"], "metric@width_metric scores channels; add"),
    "depth metric for the width": (
        "prune",
        ["metric@width_metric=angular", "pruning.ratio=0.2"],
        "metric@width_metric=angular scores blocks",
    ),
    "beside a cut that is none": (
        "train",
        ["metric=sdm", "pruning=mlp20", "adapter=lora_beside_cut", *FEW],
        "adapter.scope=beside_cut needs removed blocks, but pruning.ratio=0.2 narrows every block",
    ),
    "gradients in float16": (
        "prune",
        ["metric=taylor_width", "pruning=mlp20", "model.dtype=float16"],
        "metric=taylor_width takes gradients, which float16 rounds to zero",
    ),
    "repair of narrower blocks": (
        "prune",
        ["metric=sdm", "pruning=mlp20", "repair=ridge"],
        "repair=ridge is for removed blocks only, not for narrower ones; choose repair=none",
    ),
    "added setting": ("train", ["+adapter.ranks=3"], "adapter.ranks is not a setting; choose from alpha, "),
    "added group": ("train", ["+adapters.rank=3"], "adapters is not a setting"),
    "unknown setting of a part": ("prune", ["+metric.colour=red"], "colour"),
    "unknown setting of the logger": ("train", ["logger=wandb", "+logger.settings={base_url: x}"], "logger.settings"),
    "setting of another logger": (
        "train",
        ["logger=tensorboard", "+logger.project=x"],
        "logger.project belongs to logger=wandb",
    ),
    "shards on one device": ("train", ["trainer=fsdp"], "trainer.strategy=fsdp splits the student over devices; add"),
    "shards of 4 bits": (
        "train",
        ["trainer.strategy=fsdp", "trainer.devices=2", "adapter.quantisation=nf4"],
        "adapter.quantisation=nf4 keeps weights that trainer.strategy=fsdp cannot split",
    ),
    "shards that write": (
        "train",
        ["finetune=on_policy", "trainer.strategy=fsdp", "trainer.devices=2"],
        "finetune=on_policy has each device write answers of its own",
    ),
    "rollouts of 4 bits": (
        "train",
        ["finetune=on_policy", "rollouts.backend=transformers", "adapter.quantisation=nf4"],
        "would serve another student than learns",
    ),
    "rollouts by an adapter that is none": (
        "train",
        ["finetune=on_policy", "rollouts.backend=vllm", "adapter=full"],
        "rollouts.backend=vllm has the server load an adapter",
    ),
    "rollouts without a server": ("train", ["rollouts.base_url=http://a/v1"], "rollouts.base_url belongs to a server"),
    "device map": ("train", ["trainer.device_map=best"], "trainer.device_map=best is unknown; choose one of auto"),
    "memory of a map": (
        "train",
        ["trainer.device_map=auto", "trainer.max_memory={gpu: 1GiB}"],
        "must be amounts by device",
    ),
    "memory of no map": ("train", ["trainer.max_memory={cpu: 1GiB}"], "trainer.max_memory is for a model"),
    "kept by nothing": ("train", ["finetune.keep=best", *FEW], "finetune.keep=best needs held-out rows"),
    "kept": ("train", ["finetune.keep=first"], "finetune.keep=first is unknown; choose one of last, best"),
    "template": ("generate", ["dataset.template=hello"], "dataset.template lacks {prompt}"),
    "answer rule": ("generate", ["dataset.answer_rule=last"], "dataset.answer_rule=last is unknown"),
    "family": ("generate", ["dataset.families=[chess]"], "unknown family 'chess'"),
    "path of an embedded dataset": ("generate", ["dataset.path=x.jsonl"], "choose dataset=local"),
    "no targets": ("generate", ["finetune=none"], "finetune=none has no targets"),
    "split": ("evaluate", ["finetune=none", "evaluation.split=pool"], "evaluation.split=pool is no evaluation split"),
    "suite": ("evaluate", ["finetune=none", "evaluation.suite=big"], "evaluation.suite=big is unknown"),
    "task": ("evaluate", ["finetune=none", "evaluation.tasks=[chess]"], "evaluation.tasks: chess is unknown"),
    "no tasks": ("evaluate", ["finetune=none", "evaluation.tasks=[]"], "evaluation.tasks"),
    "limit": ("evaluate", ["finetune=none", "evaluation.limit=0"], "evaluation.limit=0 must be an integer of at least"),
    "merge": ("train", ["merge.method=mean"], "merge.method=mean is unknown"),
    "missing": ("prune", ["store.missing=skip"], "store.missing=skip is unknown; choose one of build, raise"),
    "no model": ("prune", ["model.path=nowhere"], "model.path=nowhere: no such folder"),
    "no teacher": ("generate", ["teacher.path=nowhere"], "teacher.path=nowhere: no such folder"),
    "no data": ("generate", ["dataset=local"], "dataset.path"),
    "no such data": ("generate", ["dataset=local", "dataset.path=x.jsonl"], "dataset.path=x.jsonl: no such file"),
    "no texts": ("prune", ["calibration=local"], "calibration.path"),
    "no such texts": (
        "prune",
        ["calibration=local", "calibration.path=x.jsonl"],
        "calibration.path=x.jsonl: no such file",
    ),
    "graphics card": ("prune", ["trainer=gpu"], "trainer.accelerator=gpu, but no GPU is visible here"),
    "graphics cards": ("train", ["trainer=ddp", "trainer.devices=2"], "trainer.accelerator=gpu, but no GPU is visible"),
    "artifacts is a file": ("prune", ["paths.artifacts=rows.jsonl"], "paths.artifacts="),
    "gold without any": (
        "train",
        ["dataset=local", "dataset.path=rows.jsonl", "dataset.num_rows=null", "finetune=gold", *FEW],
        "this dataset has none",
    ),
    "more rows than there are": (
        "generate",
        ["dataset=local", "dataset.path=rows.jsonl"],
        "dataset.num_rows=140, but rows.jsonl has 3 rows",
    ),
}


def changed(config: DictConfig, words: list[str]) -> DictConfig:
    """The composed config with the settings that overrides give, as Hydra reads them."""
    for override in OverridesParser.create().parse_overrides(words):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
    return config


def assert_mistake(outcome: Outcome, message: str, folder: Path) -> None:
    assert outcome.code == 2, outcome.stderr
    assert len(outcome.errors) == 1, outcome.stderr
    assert message in outcome.errors[0]
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert not list((folder / "artifacts").glob("[a-z]*"))
    assert not (folder / "artifacts" / ".partial").exists()
    (record,) = (json.loads(path.read_text()) for path in (folder / "outputs").rglob("result.json"))
    assert record["code"] == 2
    assert "error: " + record["error"] == outcome.errors[0]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of three rows in the working directory."""
    lines = [json.dumps({"prompt": f"p{n}", "reference": "r"}) for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize(("script", "words", "message"), BAD.values(), ids=BAD.keys())
def test_mistake_is_one_line(
    script: str, words: list[str], message: str, rows: Path, composed: Callable[..., DictConfig]
) -> None:
    if "no GPU is visible" in message and pytest.importorskip("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    groups = [word for word in words if "." not in word.split("=")[0]]
    config = changed(composed(*groups), [word for word in words if word not in groups])
    assert_mistake(job(script, config, rows), message, rows)


@pytest.mark.parametrize("kind", ["all blocks", "too many rows", "adapter target", "added setting", "no such data"])
def test_mistake_on_the_command_line(kind: str, rows: Path, small: list[str]) -> None:
    script, words, message = BAD[kind]
    assert_mistake(run(script, *small, *words, cwd=rows), message, rows)


ROWS = {
    "not JSON": ('{"prompt": "p", "reference": "r"}\n{oops\n', "line 2 is not valid JSON"),
    "not an object": ("[1]\n", "line 1 is not a JSON object"),
    "no reference": ('{"prompt": "p"}\n', "line 1 has no field 'reference'"),
    "empty prompt": ('{"prompt": " ", "reference": "r"}\n', "line 1 has no text in the field 'prompt'"),
    "number for text": ('{"prompt": 3, "reference": "r"}\n', "line 1 has no text in the field 'prompt'"),
    "same id": ('{"id": 1, "prompt": "p", "reference": "r"}\n' * 2, "line 2 repeats the id '1' of line 1"),
    "empty file": ("", "is empty"),
}


@pytest.mark.parametrize(("text", "message"), ROWS.values(), ids=ROWS.keys())
def test_broken_row_is_named_by_its_line(
    text: str, message: str, tmp_path: Path, composed: Callable[..., DictConfig]
) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    config = composed("dataset=local", "dataset.path=rows.jsonl", "dataset.num_rows=null", "finetune=sft")
    outcome = job("generate", config, tmp_path)
    assert_mistake(outcome, message, tmp_path)
    assert "rows.jsonl" in outcome.errors[0]


def test_calibration_text_without_its_field_is_named_by_its_line(tmp_path: Path, small: list[str]) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "fine"}\n{"txt": "wrong"}\n')
    outcome = run("prune", *small, "calibration=local", "calibration.path=texts.jsonl", cwd=tmp_path)
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
    assert "texts.jsonl: line 2 has no field 'text'" in outcome.errors[0]


def test_text_of_one_token_is_refused(tmp_path: Path, small: list[str], checkpoint: Path) -> None:
    """Without the token that begins a text, a text of one letter is a single token."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    (tmp_path / "texts.jsonl").write_text('{"text": "two tokens"}\n{"text": "a"}\n')
    words = [*small, f"model.path={folder}", "calibration=local", "calibration.path=texts.jsonl"]
    outcome = run("prune", *words, cwd=tmp_path)
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
    assert "text 2 has 1 token; a text needs at least 2" in outcome.errors[0]
    assert not list((tmp_path / "artifacts").glob("[a-z]*/*"))


def test_traceback_on_demand(tmp_path: Path, small: list[str]) -> None:
    outcome = run("prune", *small, "pruning.size=4", "hydra.verbose=true", cwd=tmp_path)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert "Traceback (most recent call last)" in outcome.stderr
    assert "UserError: pruning.size=4" in outcome.stderr


def test_failure_that_is_not_the_users_has_a_traceback_and_code_1(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*words: object) -> None:
        raise RuntimeError("something broke\nin two lines")

    monkeypatch.setattr("sdd.stages.pruned.recipe", broken)
    outcome = run("prune", *small, cwd=tmp_path)
    assert outcome.code == 1
    assert outcome.errors == ["error: RuntimeError: something broke"]
    assert "Traceback" in outcome.stderr
    assert outcome.stdout == ""


def test_attention_without_its_package_is_refused_before_any_work(small: list[str], tmp_path: Path) -> None:
    outcome = run("train", *small, "trainer.attention=flash_attention_2", cwd=tmp_path)
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.stderr
    assert "flash-attn" in outcome.errors[0]
    assert not (tmp_path / "artifacts").exists()


def test_missing_gpu_is_said_before_the_model_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's folder is not there either, which would be said first if it were looked for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = run("train", "model=local", "model.path=nowhere", "trainer=gpu", cwd=tmp_path)
    assert outcome.code == 2
    assert "no GPU is visible" in outcome.errors[0]


@pytest.mark.parametrize("kind", ["host", "device", "driver", "library", "allocator"])
def test_out_of_memory_names_what_to_turn(kind: str) -> None:
    import torch

    from sdd.cli.app import explained

    error = {
        "host": MemoryError(),
        "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "driver": RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        "library": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "allocator": RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
    }[kind]
    code, line = explained(error)
    assert (code, "\n" in line) == (2, False)
    for knob in ("trainer.micro_batch_tokens", "trainer.gradient_checkpointing", "engine.batch_size"):
        assert knob in line


def test_out_of_memory_in_a_stage_is_one_line(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*words: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 GiB")

    monkeypatch.setattr("sdd.models.checkpoints.Checkpoint.model", full)
    outcome = run("prune", *small, cwd=tmp_path)
    assert (outcome.code, len(outcome.errors), outcome.stdout) == (2, 1, ""), outcome.stderr
    assert "trainer.inference_batch_size" in outcome.errors[0]
    assert "Traceback" not in outcome.stderr
