"""The one class for a mistake of the user: a single line that says what is wrong, where, and what to do."""


class UserError(ValueError):
    """Ends a command before expensive work with one line on stderr and exit code 2."""
