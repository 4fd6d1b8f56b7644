"""The code keeps its limits: no circle of imports, one direction of imports, no too long file or function."""

import ast
import importlib

import pytest

from bench import house


def test_packages_import_in_one_direction_without_circles():
    edges = house.graph()
    assert not house.circle(edges)
    assert not house.upward(edges)


def test_no_file_and_no_function_is_too_long():
    assert not [name for lines, name in house.files() if lines > house.MOST_FILE]
    assert not [name for lines, name in house.functions() if lines > house.MOST_FUNCTION]


@pytest.mark.parametrize("package", [*house.MAY_IMPORT, "bench"])
def test_every_import_of_our_packages_exists(package):
    """Imports within functions count, too: a missing name there is otherwise only found when the function is called."""
    missing = []
    for path in sorted((house.ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) and not node.level else None
            if module and module.partition(".")[0] in house.MAY_IMPORT:
                found = importlib.import_module(module)
                for alias in node.names:
                    if not hasattr(found, alias.name) and f"{module}.{alias.name}" not in house.modules():
                        missing.append(f"{path.name}: {module}.{alias.name}")
    assert not missing
