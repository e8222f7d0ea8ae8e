"""When dead cycles are looked for, a look through all that lives: a third of a second once the libraries are there.

Rarely while configs are composed and modules imported, whose objects come by the thousand and live; as usual once a
model is open, as nothing dead may hold tensors. What modules hold is passed over from then on.
"""

import gc
import sys

NEW = 200_000
"""Objects, some 20 MB."""

_usual = gc.get_threshold()
_passed_over = 0


def look_rarely() -> None:
    """From now on, after so many new objects only."""
    gc.set_threshold(NEW, *_usual[1:])


def look_as_usual() -> None:
    gc.set_threshold(*_usual)


def pass_over_modules() -> None:
    """Never look through what lives now, if modules came since this was last done; it is to be called while no model
    is open, which could not be let go of where it lies in a circle with something that is passed over."""
    global _passed_over
    if len(sys.modules) > _passed_over:
        _passed_over = len(sys.modules)
        gc.freeze()
