"""TRACE-Bench: train an aligned language model on tasks in sequence and measure what it keeps."""

import sys

__version__ = "0.1.0"

# While Python looks for the module that -m names, argv begins with "-m". Imports take seconds, and are interrupted too.
if sys.argv[:1] == ["-m"] or (sys.argv[:1] and sys.argv[0].endswith("/trace-bench")):
    from trace_bench.ending import watch

    watch()
