"""The one class for a mistake of the user: a single line that says what is wrong, where, and what to do."""


class UserError(ValueError):
    """Ends a command before expensive work with one line on stderr and exit code 2."""


class NotFetched(UserError):
    """Something that would have to be fetched from a hub, where nothing may be fetched: a dry run does without it."""
