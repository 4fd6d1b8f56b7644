"""Which versions of the libraries work: what pyproject.toml declares, checked before anything expensive starts."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from trace_tasks.errors import TraceError

#: The packages that decide a result.
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "lm-eval", "vllm", "datasets")
#: Extras of inference engines. At most one of them is installed.
_ENGINES = ("cpu", "gpu")


class VersionError(TraceError, ImportError):
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
    wrong: dict[str, str] = {}  # what to install -> what is there
    for need in declared:
        engine = any(need.marker and need.marker.evaluate({"extra": extra}) for extra in _ENGINES)
        if need.marker and not engine:
            continue
        wanted = f"{need.name}{need.specifier}"
        try:
            found = version(need.name)
        except PackageNotFoundError:
            if not engine:
                wrong[wanted] = f"{need.name} is not installed"
        else:
            if not need.specifier.contains(found, prereleases=True):
                wrong[wanted] = f"{need.name} {found} is installed"
    if wrong:
        quoted = " ".join(f"'{name}'" for name in wrong)
        raise VersionError(
            f"{', '.join(wrong.values())}; trace-bench {version('trace-bench')} needs {', '.join(wrong)}: pip "
            f"install {quoted}"
        )


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@cache
def source_commit() -> str | None:
    """The commit of this program's checkout, with "+" when it has local changes; None outside a checkout.

    Asked once: a commit that is made later is not that of the program that runs.
    """
    here = Path(__file__).parent
    try:
        head, dirty = (
            subprocess.run(cmd, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for cmd in (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")
