"""What an artifact's manifest says of the job that built it: its command and its composed config, fit to be shared.

Nothing of the machine or its owner is in it: absolute paths keep their last part, and where things are put, who tracks
them and anything that is named like a secret is left out. Never part of a key. Knows nothing of what the settings mean.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

LEFT_OUT = ("paths", "logger", "store", "dry_run", "hydra")
"""Groups and settings that say where and by whom, not what."""

SECRET = re.compile(r"(?:^|[._])(?:token|secrets?|passwords?|api_?keys?)$", re.IGNORECASE)


def provenance(script: str, overrides: Iterable[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """`command` (a line for a shell) and `config` (plain values) of a job."""
    kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
    return {"command": command(script, overrides), "config": shareable(kept)}


def command(script: str, overrides: Iterable[str]) -> str:
    words = [f"python {script}.py"]
    for override in overrides:
        key, separator, value = override.partition("=")
        bare = key.lstrip("+~")
        if re.split(r"[./@]", bare)[0] not in LEFT_OUT and not SECRET.search(bare):
            words.append(shlex.quote(f"{key}{separator}{shareable(value)}"))
    return " ".join(words)


def shareable(value: Any) -> Any:
    """The value without absolute paths and secrets, containers included."""
    if isinstance(value, Mapping):
        return {str(key): shareable(item) for key, item in value.items() if not SECRET.search(str(key))}
    if isinstance(value, list):
        return [shareable(item) for item in value]
    if isinstance(value, str) and re.match(r"['\"]?(?:/|~|[A-Za-z]:\\)[^\n{]*[/\\]\S", value):
        return f".../{PurePath(value.strip(chr(39) + chr(34))).name}"
    return value
