"""Measures the code: lines, the longest file and function, circles of imports, and the direction of imports.

    make house

Four packages import in one direction: trace_tasks <- trace_bench <- {trainers, judges}. Imports within functions count,
too: a circle that only closes at run time is a circle. `tests/test_house.py` checks the limits. The goals for the
number of lines are no limits; the command prints how far the code is from them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Package -> the packages that it may import.
MAY_IMPORT = {
    "trace_tasks": set(),
    "trace_bench": {"trace_tasks"},
    "trainers": {"trace_tasks", "trace_bench"},
    "judges": {"trace_tasks", "trace_bench"},
}
MOST_FILE, MOST_FUNCTION = 450, 60
#: The goals for the lines of the four packages and of the tests.
GOAL, GOAL_OF_TESTS = 12_000, 11_000


def modules() -> dict[str, Path]:
    """Dotted name -> file for the modules of the four packages. A package's name stands for its `__init__.py`."""
    found = {}
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the four packages that a file imports, at any place in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else node.module)
    return names & known.keys()


def graph() -> dict[str, set[str]]:
    """Module -> the modules of the four packages that it imports."""
    known = modules()
    return {name: imported(path, known) - {name} for name, path in known.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of imports, from a module back to itself. Empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def upward(edges: dict[str, set[str]]) -> list[str]:
    """The imports against the direction, as "importer -> imported"."""
    return [
        f"{name} -> {other}"
        for name, others in edges.items()
        for other in sorted(others)
        if (here := name.partition(".")[0]) != (there := other.partition(".")[0]) and there not in MAY_IMPORT[here]
    ]


def functions() -> Iterator[tuple[int, str]]:
    """Lines and place of each function."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{name}.{node.name}"


def files() -> list[tuple[int, str]]:
    """Lines and name of each module."""
    return [(len(path.read_text(encoding="utf-8").splitlines()), name) for name, path in modules().items()]


def code_lines() -> int:
    """The lines of the four packages that are neither blank nor comment nor docstring."""
    found = 0
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        strings = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr)]
        docs = {i for s in strings if isinstance(s, ast.Constant) for i in range(s.lineno, (s.end_lineno or 0) + 1)}
        lines = enumerate(text.splitlines(), 1)
        found += sum(i not in docs and bool(line.strip()) and not line.strip().startswith("#") for i, line in lines)
    return found


def main() -> int:
    """Prints the figures. Returns 1 if a limit is exceeded."""
    lines, edges = files(), graph()
    total, long_functions = sum(n for n, _ in lines), sorted(functions(), reverse=True)
    tests = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "tests").rglob("*.py"))
    print(f"source lines      {total:,} in {len(lines)} files, {code_lines():,} of them code; goal {GOAL:,}")
    for package in MAY_IMPORT:
        print(f"  {package:16}{sum(n for n, name in lines if name.partition('.')[0] == package):,}")
    print(f"test lines        {tests:,}; goal {GOAL_OF_TESTS:,}")
    for title, found, most in (
        ("longest files", lines, MOST_FILE),
        ("longest functions", long_functions, MOST_FUNCTION),
    ):
        longest = ", ".join(f"{name} {n}" for n, name in sorted(found, reverse=True)[:3])
        print(f"{title:18}{longest}; at most {most}, {sum(n > most for n, _ in found)} are longer")
    print(f"circle of imports {' -> '.join(circle(edges)) or 'none'}")
    print(f"wrong direction   {', '.join(upward(edges)) or 'none'}")
    too_long = max(lines)[0] > MOST_FILE or long_functions[0][0] > MOST_FUNCTION
    return int(too_long or bool(circle(edges) or upward(edges)))


if __name__ == "__main__":
    sys.exit(main())
