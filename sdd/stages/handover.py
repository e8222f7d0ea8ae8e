"""A student in training, handed to the server that writes its rollouts: under a new name each time, for servers keep
what they have loaded by its name.

`transformers serve` opens the folder that a request names as its model: a stock checkpoint, the adapter merged in.
vLLM's server has the student's base and loads the adapter beside it, if it may (VLLM_ALLOW_RUNTIME_LORA_UPDATING).
Either reads files that are written here, and has to see them by the same path.
"""

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from sdd.errors import UserError
from sdd.finetuning.adapters import save_student
from sdd.merging.streaming import merge_checkpoints
from sdd.merging.students import open_students
from sdd.models.checkpoints import Checkpoint
from sdd.models.served import Server, client_of, refusal
from sdd.stages.sources import TEACHER

ALONE = {"method": "linear", "weights": [1.0]}
"""A merge of one student."""
SETTINGS = "generation_config.json"


@dataclass(frozen=True)
class Handover:
    """What is written down of a student: `base` and what it is called, `dtype` at least, `stops` that end its answers;
    in new folders of `scratch`, which are gone when the server has answered."""

    student: Any
    base: Checkpoint
    base_name: str
    dtype: str
    scratch: Path

    @contextlib.contextmanager
    def as_checkpoint(self, client: Any, server: Server, stops: list[int], sampled: bool) -> Iterator[str]:
        """A stock checkpoint's path, which `transformers serve` takes for a model."""
        with new_folder(self.scratch) as folder:
            save_student(self.student, folder, self.base, self.base_name)
            target = folder / "checkpoint"
            if not target.is_dir():
                target.mkdir()
                merge_checkpoints(self.base, open_students([folder]), ALONE, target, self.dtype, shown=False)
            settings = {"eos_token_id": stops, "do_sample": sampled, **({"top_k": 0} if sampled else {})}
            (target / SETTINGS).write_text(json.dumps(settings))
            try:
                yield str(target)
            finally:
                _let_go(client, server)

    @contextlib.contextmanager
    def as_adapter(self, client: Any, server: Server, stops: list[int], sampled: bool) -> Iterator[str]:
        """The name of an adapter that vLLM's server has beside its base."""
        with new_folder(self.scratch) as folder:
            save_student(self.student, folder, self.base, self.base_name)
            named = {"lora_name": folder.name}
            try:
                client.post("/load_lora_adapter", cast_to=str, body={**named, "lora_path": str(folder / "adapter")})
            except Exception as error:
                raise refusal(error, server, folder.name, client, "loaded adapter") from None
            try:
                yield folder.name
            finally:
                with contextlib.suppress(Exception):
                    client.post("/unload_lora_adapter", cast_to=str, body=named)


WAYS: dict[str, Callable[..., AbstractContextManager[str]]] = {
    "transformers": Handover.as_checkpoint,
    "vllm": Handover.as_adapter,
}
"""By `rollouts.backend`."""


@contextlib.contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A folder whose name no server has heard, as long as it is needed."""
    folder = parent.absolute() / f"student-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _let_go(client: Any, server: Server) -> None:
    """Have `transformers serve` forget the models that it holds, which it would keep for minutes."""
    with contextlib.suppress(Exception):
        client.with_options(max_retries=0).post(urljoin(server.url, "/reset"), cast_to=object)


def check(backend: str, server: Server | None, folder: Path) -> None:
    """Have the server say one word by the embedded model, handed over as a student will be, so that a wrong address, or
    a server that does not see this machine's files, is known before any work. vLLM's is only asked what it has."""
    if server is None:
        where = "rollouts.base_url=http://HOST/v1"
        raise UserError(f"rollouts.backend={backend} asks a server; say where on the command line: {where}")
    client = client_of(server, retries=1)
    try:
        if backend == "vllm":
            client.models.list()
            return
        with new_folder(folder) as probed:
            shutil.copytree(TEACHER, probed / "checkpoint")
            model = str(probed / "checkpoint")
            try:
                (choice,) = client.completions.create(model=model, prompt="Hello", max_tokens=1, temperature=0).choices
                if not isinstance(choice.text, str):
                    raise ValueError(f"{choice}")
            finally:
                _let_go(client, server)
    except Exception as error:
        unread = isinstance(error, AttributeError | TypeError)
        raise refusal(ValueError(f"{error}") if unread else error, server, None, client, "completion") from None
    finally:
        client.close()
