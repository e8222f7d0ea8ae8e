"""Talk to a student and to its teacher side by side: `sdd chat ADDRESS|FOLDER`.

Every line is a conversation of its own, answered greedily by both. The teacher is the model that the student was made
of, the embedded one or a `--source DIGEST=PATH`; a checkpoint folder that is no artifact has the one that `--teacher`
names. Ends with `/quit` or the end of the input.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.untrusted import expanded, printable, tell_error

QUIT = "/quit"
NEW_TOKENS = 256
DEEPEST = 5
"""Artifacts from a student to one that names the model: merged, tuned, cut twice."""
CONTEXT = 4096
"""Tokens of a line at most."""


def speakers(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(name, engine) of the teacher, where it is at hand, and of the student."""
    from sdd.models.checkpoints import Checkpoint
    from sdd.models.hub import checkpoint_folder
    from sdd.stages.sources import runtime_of
    from sdd.stages.student import checkpoint_of, open_student
    from sdd.store import STAGES, Store
    from sdd.store.store import is_place

    given = expanded(arguments.student)
    folder = given.resolve() if given.is_dir() else Store(arguments.artifacts.absolute()).find(arguments.student)
    artifact = is_place(folder)
    if artifact and not STAGES[folder.parent.name].is_model:
        raise UserError(f"{folder.parent.name}/{folder.name} is no model; name a pruned, tuned or merged artifact")
    runtime = runtime_of(arguments, accelerator="gpu" if arguments.gpu else "cpu")
    teacher = None
    if arguments.teacher is not None:
        teacher = Checkpoint(checkpoint_folder(arguments.teacher, None))
    elif artifact and (digest := _model_of(folder)) in runtime.sources:
        teacher = runtime.checkpoint(digest)
    elif artifact:
        print(f"the unpruned model is not at hand; name it with --source {digest}=PATH", file=sys.stderr)
    if teacher is not None:
        dtype = arguments.dtype or teacher.stored_dtype
        yield "teacher", _engine(teacher.model(dtype, runtime.device, runtime.attention), teacher, arguments)
    dtype = arguments.dtype or checkpoint_of(folder, runtime).stored_dtype
    model, base = open_student(folder, runtime, dtype)
    yield "student", _engine(model, base, arguments)


def _model_of(folder: Path) -> str:
    """The digest of the unpruned model that an artifact goes back to."""
    from sdd.store import read_manifest

    for _ in range(DEEPEST):
        manifest = read_manifest(folder)
        if (model := manifest["spec"].get("model")) is not None:
            return str(model)
        addresses = [manifest["inputs"].get("pruned"), *manifest["inputs"].values()]
        places = [folder.parent.parent / stage / str(own) for own in addresses for stage in ("pruned", "tuned")]
        folder = next((place for place in places if place.is_dir()), folder)
    raise UserError(f"{folder}: its manifests lead to no model; were they edited?")


def _engine(model: Any, checkpoint: Any, arguments: argparse.Namespace) -> Any:
    from sdd.rewriting.engines import HFEngine

    engine = HFEngine(max_new_tokens=arguments.max_new_tokens, max_prompt_tokens=CONTEXT)
    engine.take(model, checkpoint.tokenizer(), arguments.system_prompt, batch_size=1)
    return engine


def talk(engines: list[tuple[str, Any]], lines: Iterable[str]) -> None:
    """Every line's answers, one speaker after the other, until `/quit`."""
    from sdd.rewriting.engines import Request

    for line in lines:
        if not (prompt := line.strip()):
            continue
        if prompt == QUIT:
            return
        for name, engine in engines:
            (answer,) = engine.complete([Request("line", prompt)])
            text = answer.text if answer.finish != "too_long" else f"[more than {CONTEXT} tokens]"
            cut = " [...]" if answer.finish == "length" else ""
            print("\n".join(f"{name}: {printable(part)}" for part in f"{text}{cut}".splitlines() or [""]), flush=True)


def _typed() -> Iterator[str]:
    """Lines of the terminal, or of what is piped in."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return


def main(words: list[str] | None = None) -> int:
    from sdd.stages.sources import add_arguments

    parser = argparse.ArgumentParser(prog="sdd chat", description="Talk to a student and to its teacher side by side.")
    parser.add_argument(
        "student", help="address or folder of a pruned, tuned or merged artifact, or a checkpoint folder"
    )
    parser.add_argument("--teacher", metavar="PATH", help="folder or hub id of the model to compare with")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default as stored")
    parser.add_argument("--system-prompt", help="what stands before every line")
    parser.add_argument("--max-new-tokens", type=int, default=NEW_TOKENS, help="of an answer")
    parser.add_argument("--gpu", action="store_true", help="run on the GPU")
    add_arguments(parser)
    arguments = parser.parse_args(words)
    try:
        engines = list(speakers(arguments))
        if sys.stdin.isatty():
            print(f"every line is a conversation of its own; {QUIT} ends", file=sys.stderr)
        talk(engines, _typed())
    except UserError as error:
        return tell_error(error)
    return 0
