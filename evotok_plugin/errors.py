"""Errors that a user can fix."""


class UserError(ValueError):
    """An error in input, settings or files: the message says what was expected, what was found and what to do.

    Command lines show the message as one line. Every other exception is a bug and keeps its traceback.
    """
