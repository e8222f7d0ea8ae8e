"""When dead cycles are looked for, a look through all that lives: a third of a second once the libraries are there.

In a process of a command: rarely while configs are composed and modules imported, whose objects come by the thousand
and live; as usual once a model is open, as nothing dead may hold tensors. What modules hold is passed over from then
on. Processes of others are left as they are.
"""

import gc
import sys

NEW = 200_000
"""Objects, some 20 MB."""

_usual: tuple[int, int, int] | None = None
"""The thresholds that a process of a command began with."""
_passed_over = 0


def look_rarely() -> None:
    """From now on, after so many new objects only; this is a process of a command."""
    global _usual
    _usual = _usual or gc.get_threshold()
    gc.set_threshold(NEW, *_usual[1:])


def look_as_usual() -> None:
    if _usual:
        gc.set_threshold(*_usual)


def pass_over_modules() -> None:
    """Never look through what lives now, if modules came since this was last done; it is to be called while no model
    is open, which could not be let go of where it lies in a circle with something that is passed over."""
    global _passed_over
    if _usual and len(sys.modules) > _passed_over:
        _passed_over = len(sys.modules)
        gc.freeze()
