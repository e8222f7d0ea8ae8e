"""The program `sdd`: one name for the four scripts and the tools beside them. It imports only what is asked for."""

import sys
from importlib import import_module

HELP = """\
sdd: cut a language model, get its quality back, see what it cost. Usage: sdd COMMAND [SETTING=VALUE ...]
  sdd train dry_run=true                      what would be built, and how long it would take
  sdd prune pruning=n2                        score the blocks, write a checkpoint without two of them
  sdd generate dataset=tiny_math              the unpruned model rewrites the reference answers
  sdd train pruning=n2 finetune=self_distill  fine-tune the pruned model; then evaluate, with the same settings
  sdd evaluate -m finetune=none,sft seed=0,1  a sweep, and its report
  sdd fetch experiment=quickstart             what the hub has to give for it, for machines without a network
  sdd chat ADDRESS                            talk to a student and to the model it was made of
  sdd explain [GROUP | SETTING]               what there is to choose, what it is, what it changes
Also: report, export, serve, share, rerun, store, stages (each with --help); sdd train --help shows every setting."""
SCRIPTS = ("prune", "generate", "train", "evaluate")
FETCH = "fetch"
TOOLS = {
    "report": ("sdd.report.__main__", "main"),
    "export": ("sdd.export.checkpoint", "main"),
    "share": ("sdd.share", "main"),
    "rerun": ("sdd.share", "rerun"),
    "store": ("sdd.store.__main__", "main"),
    "stages": ("sdd.stages.__main__", "main"),
    "serve": ("sdd.export.serving", "main"),
    "chat": ("sdd.cli.chat", "main"),
    "explain": ("sdd.cli.explain", "main"),
}
"""The module and the function behind a command."""


def main(words: list[str] | None = None) -> int:
    """Run a command line; the exit code."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    command, *rest = words
    if command in (*SCRIPTS, FETCH):
        from sdd.cli import app

        script, more = ("evaluate", ["fetch=true"]) if command == FETCH else (command, [])
        sys.argv = [f"sdd-{script}", *rest, *more]
        app.main(script)
        return 0
    if command in TOOLS:
        module, function = TOOLS[command]
        code: int = getattr(import_module(module), function)(rest)
        return code
    from sdd.cli.mistakes import advice
    from sdd.untrusted import printable

    line = f"sdd has no command {command}; {advice(command, [*SCRIPTS, FETCH, *TOOLS])}"
    if "=" in command:
        line = f"{command} needs a command before it, for example: sdd train {command}"
    print(f"error: {printable(line)}", file=sys.stderr)
    return 2
