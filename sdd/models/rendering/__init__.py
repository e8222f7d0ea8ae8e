"""Chat templates, rendered within limits: a stranger's program, run in a process that has nothing to lose.

A template can ask for any amount of time and memory, in a loop or in one operation of the interpreter that nothing
interrupts (`'x' * 10**10`, `2**10**9`, a filter's width). No list of such operations is complete; what a process may
take is known to the kernel. So templates are rendered by `worker`, which is started once, has no environment, no more
memory than `MEMORY`, and is killed where one text takes longer than `SECONDS`. Knows nothing of tokens.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from datetime import datetime
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.untrusted import printable

SECONDS = 10.0
"""Wall time of one text; an ordinary template takes a ten-thousandth of a second."""
CHARACTERS = 64 << 20
"""Characters of one text: more than a row of any dataset."""
MEMORY = 1 << 30
"""Bytes of address space of the process that renders."""
SOURCE = 1 << 20
"""Characters of a template; the longest published ones have some 20,000."""

KEPT = 16 << 20
"""Characters of texts, and of what they were made of, that are kept."""

_START = 120.0
_TODAY = datetime(2024, 7, 26)
TEMPLATE_VALUES: dict[str, Any] = {
    "enable_thinking": False,
    "date_string": _TODAY.strftime("%d %b %Y"),
    "strftime_now": _TODAY.strftime,
}
"""What chat templates are given besides the messages, here and in evaluation: answers without a train of thought, and
one fixed day, since templates that tell the model the date would make every day's prompts different."""

_VALUES = {key: value for key, value in TEMPLATE_VALUES.items() if key != "strftime_now"}


class RefusalError(UserError):
    """A template raised an error of its own, as some do for a chat that their model cannot have; `reason` is its."""

    def __init__(self, reason: str) -> None:
        self.reason = printable(reason)[:300]
        super().__init__(f"the chat template does not render ({self.reason})")


class _Worker:
    """The process that renders, and the sources that it has been sent."""

    def __init__(self) -> None:
        kept = ("PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "SYSTEMROOT")
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in kept if name in os.environ},
            cwd=Path(__file__).parent,
            start_new_session=True,  # Ctrl-C is for us; without us it ends, since there is nothing more to read
        )
        self.sources: dict[str, int] = {}
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        if self._line(_START) != b"\n":
            self.end()
            raise RuntimeError(f"{sys.executable} does not start a process to render chat templates in")

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, source: str, values: str) -> dict[str, str] | None:
        """The answer; None where none comes in time, or none at all: the process is then gone."""
        known = source in self.sources
        number = self.sources.setdefault(source, len(self.sources))
        request = {
            "template": number,
            "values": values,
            "today": _TODAY.isoformat(),
            "seconds": SECONDS,
            "characters": CHARACTERS,
            **({} if known else {"source": source}),
        }
        try:
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()
            line = self._line(SECONDS)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.end()
            return None
        answer: dict[str, str] = json.loads(line)
        if "over" in answer:
            self.end()
        return answer

    def _line(self, seconds: float) -> bytes:
        """What the process writes, up to the end of a line, its own end or that of the time."""
        parts: list[bytes] = []
        deadline, number = time.monotonic() + seconds, self.answers.fileno()
        waiting = select.poll()
        waiting.register(number, select.POLLIN)
        while not parts or not parts[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.poll(1000 * left):
                break
            part = os.read(number, 1 << 16)
            if not part:
                break
            parts.append(part)
        return b"".join(parts)

    def end(self) -> None:
        if self.owner != os.getpid():
            return
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.answers.close()


def render(source: str, values: dict[str, Any]) -> str:
    """The text that a template makes of values, which are plain data.

    A `RefusalError` where it raises an error of its own, a `UserError` where it takes more than it may.
    """
    if len(source) > SOURCE:
        raise UserError(f"the chat template has {len(source):,} characters, more than the {SOURCE:,} that are read")
    return _texts.text(source, json.dumps(values, default=str))


class _Texts:
    """What was rendered last, up to `KEPT`: a row's chat is asked for more than once, by the jobs of a sweep too."""

    def __init__(self) -> None:
        self.worker: _Worker | None = None
        self.lock = threading.Lock()
        self.known: OrderedDict[tuple[str, str], str] = OrderedDict()
        self.characters = 0

    def text(self, source: str, values: str) -> str:
        key = (source, values)
        with self.lock:
            if (text := self.known.get(key)) is not None:
                self.known.move_to_end(key)
                return text
            text = self.known[key] = self._rendered(source, values)
            self.characters += len(values) + len(text)
            while self.characters > KEPT:
                (_, asked), last = self.known.popitem(last=False)
                self.characters -= len(asked) + len(last)
        return text

    def _rendered(self, source: str, values: str) -> str:
        if self.worker is None or not self.worker.usable():
            self.worker = _Worker()
        began = time.monotonic()
        answer = self.worker.ask(source, values)
        if answer is None:
            if time.monotonic() - began < SECONDS:
                raise UserError("the chat template ends the process that renders it")
            raise UserError(f"the chat template takes more than {SECONDS:g} s for one text")
        if "over" in answer:
            most = f"{CHARACTERS:,} characters" if answer["over"] == "characters" else f"{MEMORY >> 20:,} MB"
            raise UserError(f"the chat template makes more than {most} of one text")
        if "error" in answer:
            raise RefusalError(answer["error"])
        return answer["text"]


_texts = _Texts()


@atexit.register
def _end() -> None:
    if _texts.worker is not None:
        _texts.worker.end()


def render_chat(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """A chat in the words of the tokenizer's template, as transformers' `apply_chat_template` has it."""
    try:
        source = tokenizer.get_chat_template()
    except ValueError:
        raise UserError("the tokenizer has several chat templates and none of them is called default") from None
    if not isinstance(source, str):
        raise UserError("the chat template is not a text")
    given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **_VALUES}
    return render(source, {**tokenizer.special_tokens_map, "messages": messages, **given})
