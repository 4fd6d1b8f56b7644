"""TRACE-Bench: train an aligned language model on tasks in sequence and measure what it keeps."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_bench.callback import ForgettingCallback  # noqa: F401

__version__ = "0.1.0"

# While Python looks for the module that -m names, argv begins with "-m". Imports take seconds, and are interrupted too.
if sys.argv[:1] == ["-m"] or (sys.argv[:1] and sys.argv[0].endswith("/trace-bench")):
    from trace_bench.ending import watch

    watch()


def __getattr__(name: str) -> Any:
    """What users import from here, and what takes seconds to import."""
    if name == "ForgettingCallback":
        return import_module("trace_bench.callback").ForgettingCallback
    raise AttributeError(f"module 'trace_bench' has no attribute {name!r}")
