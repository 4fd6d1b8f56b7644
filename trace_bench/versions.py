"""Which versions of the libraries work: what pyproject.toml declares, checked before anything expensive starts."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from trace_tasks.data.files import digest
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


def code_digest(files: Iterable[Path]) -> str:
    """A digest of what the code in files does: comments, docstrings and layout do not count.

    It is the same with every version of Python, unlike `ast.dump` and `ast.unparse`.
    """
    return _digest(*(file.read_bytes() for file in files))


@cache
def _digest(*sources: bytes) -> str:
    return digest([_syntax(source) for source in sources])


def _syntax(source: bytes) -> Any:
    """The syntax tree of a file as JSON; of a file that is not Python, its text."""
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree) if b"__doc__" not in source else ():
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        return _plain(tree)
    except (SyntaxError, ValueError, RecursionError):
        return source.decode("utf-8", "replace")


def _plain(part: Any) -> Any:
    """A part of a syntax tree as JSON, without empty fields: which of them there are depends on the version."""
    if isinstance(part, ast.JoinedStr):  # Python 3.12 adds empty texts to a format, as in f"{x:{width}}"
        part.values = [one for one in part.values if not (isinstance(one, ast.Constant) and one.value == "")]
    if isinstance(part, ast.AST):
        fields = [[name, _plain(value)] for name, value in ast.iter_fields(part) if value is not None and value != []]
        return [type(part).__name__, *fields]
    # Not `repr`, which escapes the characters that its Python does not know.
    return [_plain(one) for one in part] if isinstance(part, list) else ascii(part)
