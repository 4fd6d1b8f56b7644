"""How the model learns: one method is one file, runnable as `python -m trainers.<method>`."""

import sys

from trace_bench import ending, versions

# While Python looks for the module that -m names, argv begins with "-m".
if sys.argv[:1] == ["-m"] and not {"-h", "--help"}.isdisjoint(sys.argv):
    from trainers.help import show

    with ending.command("help"):
        if any(show(name.removeprefix("trainers.")) for name in sys.orig_argv if name.startswith("trainers.")):
            sys.exit()

versions.check()  # before TRL is imported, whose names differ between versions
