"""The other side of `sdd.models.rendering`: a process that renders chat templates, and may be killed at any time.

The environment is transformers' own (`transformers.utils.chat_template_utils`): sandboxed and immutable, loop controls,
the generation tag, `tojson`, `raise_exception` and `strftime_now`; a test holds the two to the same text. One line of
JSON is a request, one an answer. Imports nothing of this project, and is given nothing of the environment's.
"""

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` is what it holds: here nobody asks which part the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_held"), [], [], body).set_lineno(line)

    def _held(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


class TooLarge(Exception):
    """The text has grown beyond what was asked for."""


def _text(template: Template, values: dict[str, Any], today: str, characters: int) -> str:
    parts, length = [], 0
    for part in template.generate(**values, strftime_now=datetime.fromisoformat(today).strftime):
        length += len(part)
        if length > characters:
            raise TooLarge
        parts.append(part)
    return "".join(parts)


def _limit_time(seconds: float) -> None:
    """The kernel ends this process when it has computed for so long, whatever it is doing and whoever still waits."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main(memory: int) -> None:
    """Answer requests until there are none."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment = _environment()
    templates: list[Template | None] = []
    print(flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        _limit_time(request["seconds"])
        answer: dict[str, str] = {}
        try:
            if "source" in request:
                templates.append(None)
                templates[-1] = environment.from_string(request["source"])
            template = templates[request["template"]]
            if template is None:
                raise TemplateError("the template does not compile")
            answer["text"] = _text(template, json.loads(request["values"]), request["today"], request["characters"])
        except MemoryError:
            answer["over"] = "memory"
        except TooLarge:
            answer["over"] = "characters"
        except Exception as error:
            answer["error"] = str(error)[:1000] if isinstance(error, TemplateError) else type(error).__name__
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
