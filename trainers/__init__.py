"""How the model learns: one method is one file, runnable as `python -m trainers.<method>`."""

from trace_bench import versions

versions.check()  # before TRL is imported, whose names differ between versions
