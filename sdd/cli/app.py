"""The command line: Hydra composes, the allow-list is checked, recipes are derived, the store is asked.

One function serves the four scripts. A job catches its own failure, writes `result.json` into its run folder and
returns, so that a sweep goes on; the exit code follows from what was recorded: 0, 2 if every failure is the user's
mistake, else 1.
"""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import hydra._internal.hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sdd.cli.loader import PACKAGE, CheckedConfigLoader, config_folder
from sdd.cli.students import composed_students, quoted
from sdd.config import Config, check_values, plain
from sdd.errors import UserError
from sdd.models.panics import is_panic
from sdd.store.digests import write_atomically
from sdd.untrusted import expanded, printable

log = logging.getLogger(__name__)

ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("package_folder", lambda sub: str(PACKAGE / sub), replace=True)
OmegaConf.register_new_resolver("process_id", lambda: str(os.getpid()), replace=True, use_cache=True)  # for workers too

USER, FAILURE = 2, 1
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How it shows where it has no class of its own."""


def main(script: str) -> None:
    """Run one of the scripts "prune", "generate", "train", "evaluate" on the process's command line."""
    flags = (word.split("=")[0] for word in sys.argv[1:])
    if any(len(word) > 2 and "--experimental-rerun".startswith(word) for word in flags):  # argparse takes short forms
        print("error: --experimental-rerun unpickles a file, which can run code; pass the overrides", file=sys.stderr)
        raise SystemExit(USER)
    hydra._internal.hydra.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
    outcome.clear()
    sys.argv[1:] = map(quoted, sys.argv[1:])
    hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(_task(script))()
    if outcome:
        raise SystemExit(max(outcome) if set(outcome) - {0, USER} == set() else FAILURE)


outcome: list[int] = []
"""Exit codes of this process's jobs; at the end of a sweep, of all its jobs."""


def _task(script: str) -> Callable[[DictConfig], None]:
    def task(config: DictConfig) -> None:
        run_job(script, config)

    task.__module__ = f"sdd.{script}"  # Hydra names the job after it
    return task


def run_job(script: str, config: DictConfig) -> int:
    """One job: print the artifact's path on stdout, or one line of error on stderr; record either."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    record: dict[str, Any] = {"script": script, "overrides": list(HydraConfig.get().overrides.task)}
    code = 0
    try:
        record |= make(script, config, folder)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        code, message = explained(error)
        record["error"], record["code"] = message, code
        print(f"error: {message}", file=sys.stderr)
        if code == FAILURE or HydraConfig.get().verbose:
            traceback.print_exc()
    with contextlib.suppress(OSError):
        write_atomically(folder / "result.json", json.dumps(record, indent=1) + "\n")
    outcome.append(code)
    return code


def explained(error: BaseException) -> tuple[int, str]:
    """(exit code, one line) for an exception; a full disk is the user's to mend, wherever it is noticed."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error) or "os error 28" in str(error):
        path = (error.filename2 or error.filename) if isinstance(error, OSError) else None  # a copy names both
        where = f" at {path}" if path else ""
        return USER, f"the disk is full{where}; free space and run the same command again, finished work is kept"
    kind = type(error).__name__
    if kind in ("MemoryError", "OutOfMemoryError") or any(words in str(error) for words in OUT_OF_MEMORY):
        return USER, (
            "out of memory; ask for less at once: trainer.micro_batch_tokens or trainer.gradient_checkpointing=true in "
            "fine-tuning, engine.batch_size, evaluation.batch_size or trainer.inference_batch_size elsewhere"
        )
    if isinstance(error, UserError):
        return USER, printable(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return USER, printable(f"{error.strerror}: {str(error.filename)[:200]}")
    first = (str(error).splitlines() or [""])[0]
    if is_panic(error):
        return USER, printable(f"the tokenizer gives up on a text ({first[:200]}); use another tokenizer.json")
    return FAILURE, printable(f"{kind}: {first}")


def make(script: str, config: DictConfig, run_folder: Path) -> dict[str, Any]:
    """Check the config, derive the recipe, and have it built; what the job's record says of it."""
    check_values(config)
    if config.dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by the hub's library when it is imported, here or in a worker
    else:
        _check_machine(config.trainer)
    from sdd.config.provenance import provenance
    from sdd.stages import graph, tuned
    from sdd.store import Store
    from sdd.study import Study

    root = expanded(config.paths.artifacts).absolute()
    store = Store(root, provenance(script, HydraConfig.get().overrides.task, plain(config)))
    students = composed_students(config)
    study = Study(config, root / ".digests", [Study(student, root / ".digests") for student, _ in students])
    wanted = graph.wanted(study, script)
    if config.dry_run:
        return {"dry_run": True, "plan": print_plan(wanted, study, store)}
    if wanted is None:
        folder = study.models.checkpoint.folder
        print(folder, flush=True)
        return {"stage": "model", "path": str(folder)}
    if not store.has(wanted):
        from sdd.stages import builds

        graph.read_data(study, (recipe for recipe in wanted.walk() if not store.has(recipe)))
        if any(recipe.stage == "tuned" and not store.has(recipe) for recipe in wanted.walk()):
            check_tracker(config.logger)
            for one in study.students or [study]:
                _check_quantisation(one.config.adapter.quantisation)
        _use_threads(config.trainer.threads)
        how = builds(_runtime(config, study, run_folder))
        merging = any(recipe.stage == "merged" and not store.has(recipe) for recipe in wanted.walk())
        if merging and config.store.missing == "build":  # so that a student's manifest names its own command and config
            for student, (own, words) in zip(study.students, students, strict=True):
                Store(root, provenance("train", words, plain(own))).ensure(tuned.recipe(student), how)
        store.ensure(wanted, how, config.store.missing)
    path = store.folder(wanted)
    print(path, flush=True)
    return {"stage": wanted.stage, "address": wanted.address, "path": str(path)}


def print_plan(wanted: Any, study: Any, store: Any) -> list[dict[str, Any]]:
    """The graph of artifacts, inputs first, each with whether it exists and what it takes; on stdout, as asked for."""
    if wanted is None:
        print("nothing to build: the unpruned model itself")
        return []
    from sdd.stages.dry_run import assumption, lines, planned, summary

    plan = planned(wanted, study, store)
    print("\n".join(lines(plan)))
    records = [artifact.record() for artifact in plan]
    log.info(summary(records))
    log.info(assumption(study.config.trainer.accelerator))
    if any(artifact.provisional for artifact in plan):
        log.info("addresses with a question mark are known once the model and the data have been fetched")
    return records


def check_tracker(logger: Mapping[Any, Any]) -> None:
    """Refuse to begin what would end at the tracker's door."""
    offline = logger.get("offline") or os.environ.get("WANDB_MODE", "online") != "online"
    if not str(logger.get("_target_")).endswith(".WandbLogger") or offline:
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError("logger=wandb, but nobody is logged in here; run: wandb login, or add logger.offline=true")


def _check_quantisation(quantisation: str | None) -> None:
    if quantisation is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"adapter.quantisation={quantisation} needs bitsandbytes; run: pip install 'sdd[quantisation]'")


def _check_machine(trainer: DictConfig) -> None:
    """What the trainer asks of this machine, before anything is fetched."""
    if trainer.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "trainer.attention=flash_attention_2 needs the package flash-attn; choose trainer.attention=sdpa"
        )
    if trainer.accelerator == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise UserError("trainer=gpu, but no GPU is visible here; choose trainer=cpu")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _runtime(config: DictConfig, study: Any, run_folder: Path) -> Any:
    from sdd.stages.runtime import Runtime

    trainer = config.trainer
    return Runtime(
        sources=study.sources,
        texts=study.texts,
        tasks=study.tasks,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        attention=trainer.attention,
        **Runtime.sizes(config),
        checkpoint_every=trainer.checkpoint_every,
        gradient_checkpointing=trainer.gradient_checkpointing,
        logger=plain(config.logger),
        run_folder=run_folder,
    )


def prune() -> None:
    main("prune")


def generate() -> None:
    main("generate")


def train() -> None:
    main("train")


def evaluate() -> None:
    main("evaluate")
