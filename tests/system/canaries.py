"""Canaries: what tells whether a hostile input did any harm."""

from dataclasses import dataclass
from pathlib import Path

from launching import Outcome

SECRET = "s3cr3t-canary-value"
LIMIT = 120.0
"""Seconds after which a case counts as hanging. A refusal takes far less; importing libraries, or reading the whole
index of lm-eval, takes half a minute on a busy machine."""


@dataclass(frozen=True)
class Canaries:
    """`ran` would be made by hostile code, `outside` be read or written by it; `work` is where it is tried."""

    work: Path
    ran: Path
    outside: Path

    def fill(self, text: str) -> str:
        """A payload with RAN, OUTSIDE and SECRET's variable in place."""
        return text.replace("RAN", str(self.ran)).replace("OUTSIDE", str(self.outside))

    def check(self, text: str = "") -> None:
        """Nothing ran, nothing outside was changed, and `text` and every file below `work` keep the secrets."""
        assert not self.ran.exists(), "code of a stranger ran"
        assert self.outside.read_text() == f"{SECRET} outside\n", "a file outside was written"
        assert SECRET not in text, "a secret was printed"
        for path in self.work.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert SECRET.encode() not in path.read_bytes(), f"a secret was copied to {path}"

    def check_refused(self, outcome: Outcome) -> None:
        """One line, exit code 2, no traceback, no control character, nothing on stdout, no harm."""
        assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
        assert "Traceback" not in outcome.stderr, outcome.stderr
        assert all(c.isprintable() or c in "\n\r" for c in outcome.stderr), ascii(outcome.stderr)
        self.check(outcome.stderr)
