"""The one family of errors that a user can mend. Commands print their message without a traceback and exit with 1."""


class TraceError(Exception):
    """Something that the user can put right; the message has the value, what is allowed and how to fix it."""
