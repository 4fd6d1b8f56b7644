"""`python -m trace_bench.cli` is `trace-bench`."""

from trace_bench.cli import main

main()
