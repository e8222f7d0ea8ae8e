"""A composed config at work: its study, and the artifacts that it asks for, built where they are missing."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sdd.cli.gpus import claim_gpus
from sdd.cli.students import composed_before, composed_students
from sdd.cli.words import command
from sdd.config import check_values, plain
from sdd.config.allowed import build as build_part
from sdd.config.parts import TENSORBOARD
from sdd.errors import UserError
from sdd.store import STAGES, Builder, Recipe, Store, digest_of
from sdd.untrusted import expanded

if TYPE_CHECKING:
    from sdd.forward.nodes import Nodes
    from sdd.study import Study


def typed() -> list[str]:
    """The overrides of this job, as they were given: nothing in them is resolved."""
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(words)


class Job:
    """One config, composed with `overrides` and checked; its trackers and logs go to `run_folder`; `nodes` are the
    commands of other machines that do the same job.

    Make it while Hydra is there, which composes the students of a merge.
    """

    def __init__(
        self, config: DictConfig, overrides: Iterable[str], run_folder: Path, nodes: Nodes | None = None
    ) -> None:
        check_values(config)
        if config.dry_run:
            os.environ["HF_HUB_OFFLINE"] = "1"  # read by the hub's library when it is imported, here or in a worker
        else:
            _check_machine(config.trainer)
        self.config, self.overrides, self.run_folder = config, list(overrides), run_folder
        self.nodes = nodes
        self.choices = dict(HydraConfig.get().runtime.choices)
        self.root = expanded(config.paths.artifacts).absolute()
        self.commands: list[tuple[Study, list[str]]] = []
        """The studies of students that others are made of, in that order, and the overrides of each."""
        students = [self._study(*student) for student in composed_students(config)]
        self.study = self._study(config, typed(), students)
        self.commands.pop()

    def _study(self, config: DictConfig, words: list[str], students: Sequence[Study] = ()) -> Study:
        from sdd.study import Study

        before = composed_before(config, words)
        study = Study(config, self.root / ".digests", students, None if before is None else self._study(*before))
        self.commands.append((study, words))
        return study

    def wanted(self, script: str) -> Recipe | None:
        """The artifact that "prune", "generate", "train" or "evaluate" is asked for; None: the unpruned model itself.

        What it is made of are its `inputs`: a pruned model's are its scores.
        """
        from sdd.stages import graph

        try:
            wanted = graph.wanted(self.study, script)
        except UserError:
            self._check_fits(script, graph.embedded_groups(self.study, None))
            raise
        self._check_fits(script, graph.embedded_groups(self.study, list(wanted.walk()) if wanted else []))
        return wanted

    def _check_fits(self, script: str, embedded: list[str]) -> None:
        """Refuse the embedded texts and tasks (the groups that chose them) for a public model, with what was meant."""
        if not embedded:
            return
        replaced = (*embedded, "experiment")
        kept = [word for word in self.overrides if word.partition("=")[0] not in replaced]
        instead = "experiment=quickstart" if self.choices.get("experiment") else "settings=public"
        words = [instead, *(word for word in kept if not word.startswith("settings="))]
        raise UserError(
            f"{' '.join(f'{group}={self.choices.get(group)}' for group in embedded)}: made for the embedded model, "
            f"which {self.config.model.path} is not; you probably meant: {command(script, words)}"
        )

    def fit(self, missing: Sequence[Recipe]) -> None:
        """Put numbers in the place of settings that are `auto`, by what the artifacts to build take."""
        from sdd.stages import fitting

        configs = [self.config, self.study.config, *(study.config for study in self.study.others)]
        if not any(map(fitting.is_asked, configs)):
            return
        from sdd.stages.dry_run import estimator

        estimate = estimator(self.study)
        accelerator = self.config.trainer.accelerator

        def memory() -> float:
            return max((estimate(recipe).memory for recipe in missing), default=0.0)

        fitting.fit(configs, memory, lambda: fitting.free_memory(accelerator))

    def store(self, script: str) -> Store:
        """The store, in which what is new is said to be asked for by a script."""
        return self._store(script, self.overrides, self.study.config)

    def _store(self, script: str, overrides: Iterable[str], config: DictConfig) -> Store:
        from sdd.config.provenance import provenance

        return Store(self.root, lambda: provenance(script, overrides, plain(config)))

    def build(self, wanted: Recipe, script: str | None = None, meanwhile: Callable[[], bool] = lambda: False) -> Path:
        """The folder of an artifact, built with all that it lacks; `meanwhile` as in the store."""
        store = self.store(script or STAGES[wanted.stage].script)
        missing = store.missing(wanted)
        if self.nodes:
            named = set(self.nodes.agree(self._asked(wanted), [one.address for one in missing]))
            missing = [recipe for recipe in wanted.walk() if recipe.address in named]
        elif self.config.trainer.num_nodes > 1 and missing:
            raise UserError("trainer.num_nodes: several machines run the scripts, each the same command")
        if self.nodes and not self.nodes.is_first:
            self._lend(self.nodes, store, wanted, missing)
        elif missing:
            build = self._builder(wanted, missing)
            for own, recipe in self._steps(store, wanted, missing):
                own.ensure(recipe, build, self.config.store.missing, meanwhile)
        return store.folder(wanted)

    def _asked(self, wanted: Recipe) -> str:
        """The artifact, and a digest of how the ranks go about it, which all nodes have to be told alike."""
        from sdd.stages.runtime import Runtime

        how = digest_of([plain(self.config.trainer), Runtime.sizes(self.config)])
        return f"{wanted.stage}/{wanted.address} (trainer {how[:8]})"

    def _lend(self, nodes: Nodes, store: Store, wanted: Recipe, missing: list[Recipe]) -> None:
        """Have this machine's ranks take part in what the first node builds, until the artifact is there."""
        from sdd.stages.sharing import SEEN

        build = self._builder(wanted, missing) if missing else None
        recipes = {recipe.address: recipe for recipe in missing}
        for address in nodes.stages():
            assert build is not None
            build(recipes[address], store.inputs(recipes[address]), store.partial(recipes[address]))
        until = time.monotonic() + SEEN
        while not store.has(wanted):
            if time.monotonic() > until:
                raise UserError(
                    f"{store.folder(wanted)} is not there, and node 0 has built it; paths.artifacts has to be a folder "
                    "that all nodes share"
                )
            time.sleep(1.0)

    def advance(self, wanted: Recipe, script: str) -> bool:
        """Build one artifact that is missing for another and that nobody builds; whether there was one."""
        store = self.store(script)
        missing = store.missing(wanted)
        return any(
            own.advance(recipe, lambda *given: self._builder(wanted, missing)(*given), self.config.store.missing)
            for own, recipe in self._steps(store, wanted, missing)
        )

    def _steps(self, store: Store, wanted: Recipe, missing: list[Recipe]) -> Iterator[tuple[Store, Recipe]]:
        """What is asked for in turn; students come first, so that their manifests name their own command and config."""
        from sdd.stages import graph

        for study, words in self.commands if self.config.store.missing == "build" else ():
            student = graph.student(study)
            if student in missing:
                yield self._store(STAGES[student.stage].script, words, study.config), student
        yield store, wanted

    def _builder(self, wanted: Recipe, missing: list[Recipe]) -> Builder:
        """What builds them, after all that would stop it has been looked at."""
        from sdd.stages import builder, evaluated, graph, rolled, targets

        graph.read_data(self.study, missing)
        self.fit(missing)
        stages, runtime = {recipe.stage for recipe in missing}, self._runtime()
        if "rewrites" in stages:
            build_part(self.config.engine).check(runtime.place)
        for recipe in missing:
            if recipe.stage == "targets":
                targets.check(runtime, recipe)
            if recipe.stage == "tuned":
                rolled.check(runtime, recipe, self.root / ".partial")
        if wanted.stage == "evaluated":
            evaluated.check_backend(self.study, runtime, evaluated.read_spec(wanted))
        if "tuned" in stages:
            check_tracker(self.config.logger)
            for one in (self.study, *self.study.others):
                _check_quantisation(one.config.adapter.quantisation)
        _use_threads(self.config.trainer.threads)
        return builder(runtime)

    def fetch(self, wanted: Recipe | None) -> None:
        """Have all that the hub has to give for an artifact lie on this machine, so that none is needed to build it.

        The models are there already: the recipe names them by their content.
        """
        from sdd.stages import evaluated, graph

        recipes = list(wanted.walk()) if wanted else []
        graph.read_data(self.study, [recipe for recipe in recipes if recipe.stage != "evaluated"])
        if any(recipe.stage == "evaluated" for recipe in recipes):
            evaluated.fetch_rows(self.study)
        for folder in dict.fromkeys(self.study.sources.values()):
            print(folder, flush=True)

    def _runtime(self) -> Any:
        from sdd.models.spread import Spread
        from sdd.stages.runtime import Runtime

        trainer = self.config.trainer
        spread = Spread(trainer.device_map, plain(trainer.max_memory or OmegaConf.create()), trainer.accelerator)
        return Runtime(
            sources=self.study.sources,
            texts=self.study.texts,
            tasks=self.study.tasks,
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            nodes=self.nodes,
            strategy=trainer.strategy,
            spread=spread if trainer.device_map else None,
            attention=trainer.attention,
            **Runtime.sizes(self.config),
            checkpoint_every=trainer.checkpoint_every,
            gradient_checkpointing=trainer.gradient_checkpointing,
            logger=plain(self.config.logger),
            run_folder=self.run_folder,
            servers=Runtime.servers_of(self.config),
        )


def check_tracker(logger: Mapping[Any, Any]) -> None:
    """Refuse to begin what would end at the tracker's door."""
    if logger.get("_target_") == TENSORBOARD and importlib.util.find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard needs tensorboard; run: pip install 'sdd[tensorboard]'")
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

        claim_gpus(trainer.devices)

        if not torch.cuda.is_available():
            raise UserError("trainer.accelerator=gpu, but no GPU is visible here; choose trainer=cpu")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
