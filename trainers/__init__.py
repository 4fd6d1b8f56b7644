"""How the model learns: one method is one file, runnable as `python -m trainers.<method>`."""

import sys
from pathlib import Path

from trace_bench import ending, versions

# While Python looks for the module that -m names, argv begins with "-m".
if sys.argv[:1] == ["-m"] and not {"-h", "--help"}.isdisjoint(sys.argv):
    from trainers.help import show

    with ending.command("help"):
        names = [name for name in sys.orig_argv if name.startswith("trainers.")]
        if any(show(Path(__file__).with_name(f"{n.removeprefix('trainers.')}.py"), f"python -m {n}") for n in names):
            sys.exit()

versions.check()  # before TRL is imported, whose names differ between versions
