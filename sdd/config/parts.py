"""The classes that a config may choose among, by frozen ids.

An id stands in configs, in content keys and in manifests, for good: where a class lies now is said here and nowhere
else, so that a class that moves keeps its artifacts, and old manifests can be rebuilt. (The ids are import paths of
the time when each class was first named.)
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from sdd.config.own import CLASSES

_CRITERIA = {
    "sdd.importance.Angular": "sdd.importance.states",
    "sdd.importance.BlockInfluence": "sdd.importance.states",
    "sdd.importance.Random": "sdd.importance.states",
    "sdd.importance.Last": "sdd.importance.states",
    "sdd.block_weights.Magnitude": "sdd.importance.weights",
    "sdd.block_weights.Taylor": "sdd.importance.weights",
    "sdd.removal.Perplexity": "sdd.importance.removal",
    "sdd.removal.Iterative": "sdd.importance.removal:iterative",
    "sdd.channels.SDM": "sdd.importance.channels",
    "sdd.channels.TaylorWidth": "sdd.importance.channels",
    "sdd.channels.ActivationWidth": "sdd.importance.channels",
    "sdd.channels.MagnitudeWidth": "sdd.importance.channels",
    "sdd.channels.RandomWidth": "sdd.importance.channels",
}
_TEXTS = {
    "sdd.data.tiny.TinyTexts": "sdd.data.tiny",
    "sdd.data.texts.LocalTexts": "sdd.data.texts",
    "sdd.data.texts.CorpusTexts": "sdd.data.texts",
    "sdd.data.texts.WikiText2": "sdd.data.texts",
    "sdd.data.texts.DatasetTexts": "sdd.data.texts",
}
_ROWS = {
    "sdd.data.tiny.TinyTasks": "sdd.data.tiny",
    "sdd.data.local.LocalRows": "sdd.data.local",
    "sdd.data.instruct.GSM8K": "sdd.data.instruct",
    "sdd.data.instruct.Dolly": "sdd.data.instruct",
    "sdd.data.instruct.Alpaca": "sdd.data.instruct",
    "sdd.data.instruct.OpenMathInstruct1": "sdd.data.instruct",
    "sdd.data.instruct.OpenMathInstruct2": "sdd.data.instruct",
}
_MIXTURES = {"sdd.data.mixture.Mixture": "sdd.data.mixture"}
_ENGINES = {
    "sdd.engines.HFEngine": "sdd.rewriting.engines",
    "sdd.rewriting.OpenAIEngine": "sdd.rewriting.server",
    "sdd.rewriting.VLLMEngine": "sdd.rewriting.vllm",
}
TENSORBOARD = "pytorch_lightning.loggers.TensorBoardLogger"
_LOGGERS = dict.fromkeys(("pytorch_lightning.loggers.WandbLogger", TENSORBOARD), "pytorch_lightning.loggers")

SWEEP_END = "sdd.cli.sweep.SweepEnd"
"""What Hydra itself makes at the end of a sweep; in no content key, so that its name may change."""

TARGETS: dict[tuple[str, ...], frozenset[str]] = {
    ("metric",): frozenset(_CRITERIA),
    ("width_metric",): frozenset(_CRITERIA),
    ("calibration",): frozenset(_TEXTS),
    ("dataset",): frozenset(_ROWS | _MIXTURES),
    ("dataset", "parts", "*"): frozenset(_ROWS),
    ("analysis", "prompts"): frozenset(_ROWS),
    ("engine",): frozenset(_ENGINES),
    ("logger",): frozenset(_LOGGERS),
    ("hydra", "callbacks", "*"): frozenset({SWEEP_END}),
}
"""Under each key of the config, the ids that may stand there; under any other, none."""

PLACES = _CRITERIA | _TEXTS | _ROWS | _MIXTURES | _ENGINES | _LOGGERS
"""Id -> the module in which the class of that name lies; after a colon, the function that chooses among classes."""


def maker_of(id: str) -> Callable[..., Any]:
    """The class or function that an id stands for; a `KeyError` where it stands for none."""
    module, _, function = PLACES[id].partition(":")
    maker: Callable[..., Any] = getattr(import_module(module), function or id.rpartition(".")[2])
    return maker


def class_of(id: str) -> type[Any]:
    """The class that an id stands for, where it is no function; of which kind, its caller says by an annotation."""
    found = maker_of(id)
    assert isinstance(found, type), f"{id} stands for the function {found}"
    return found


def id_of(part: Any) -> str:
    """The id of a class's instance."""
    kind = type(part)
    if own := [id for id, allowed in CLASSES.items() if allowed is kind]:
        return own[0]
    ids = [id for id, place in PLACES.items() if (place, id.rpartition(".")[2]) == (kind.__module__, kind.__name__)]
    if len(ids) != 1:
        raise KeyError(f"{kind.__module__}.{kind.__name__} has no id; add one to sdd.config.parts")
    return ids[0]
