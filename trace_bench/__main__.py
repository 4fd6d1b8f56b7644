"""`python -m trace_bench` is `trace-bench`."""

from trace_bench.cli import main

main()
