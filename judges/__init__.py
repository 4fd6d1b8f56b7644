"""Who decides where no string match can: judges of instruction following and safety, and the teacher of RCL."""

from trace_tasks.errors import TraceError


class JudgeError(TraceError):
    """The judge cannot be asked; the message says why and what to do. It never holds the API key."""
