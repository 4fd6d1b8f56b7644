"""The errors that a user can mend: one family. Commands print their message without a traceback and exit with 1."""


class TraceError(Exception):
    """Something that the user can put right; the message has the value, what is allowed and how to fix it."""


class DataError(TraceError):
    """Data or a file is missing or not as it should be; the message says where and how to fix it."""
