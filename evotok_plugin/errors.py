"""Errors that a user can fix."""


class UserError(ValueError):
    """Input, settings or files that a user can fix: the message says what was expected, what came and what to do.

    Command lines show the message as one line. Every other exception is a bug and keeps its traceback.
    """
