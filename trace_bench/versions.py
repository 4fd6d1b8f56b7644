"""Which versions of the libraries work: what pyproject.toml declares, checked before anything expensive starts."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

#: Extras of inference engines. One of them may be there; neither has to be.
_ENGINES = ("cpu", "gpu")


class VersionError(ImportError):
    """A library is missing or has a version that is not supported; the message says which one and what to install."""


@cache
def check() -> None:
    """Compares the installed libraries with the ranges that trace-bench declares.

    An installer keeps them too, but not with `--no-deps`, nor when another package is installed later.

    Raises:
        VersionError: naming each library that does not fit, the version found, and the command that mends it.
    """
    try:
        declared = [Requirement(text) for text in requires("trace-bench") or ()]
    except PackageNotFoundError:  # the sources alone, on PYTHONPATH: nothing is declared
        return
    wrong = []
    for requirement in declared:
        engine = any(requirement.marker and requirement.marker.evaluate({"extra": extra}) for extra in _ENGINES)
        if requirement.marker and not engine:
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if not engine:
                wrong.append((requirement, "is not installed"))
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement, f"{found} is installed"))
    if wrong:
        found_there = ", ".join(f"{r.name} {what}" for r, what in wrong)
        wanted = [f"{r.name}{r.specifier}" for r, _ in wrong]
        quoted = " ".join(f"'{name}'" for name in wanted)
        raise VersionError(
            f"{found_there}; trace-bench {version('trace-bench')} works with {', '.join(wanted)}: pip install {quoted}"
        )
