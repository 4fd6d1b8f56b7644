"""Finds what comes with the package by name: methods, configs, studies and tables of settings."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trace_tasks.errors import TraceError, suggestion

TRAINERS = Path(__file__).parent.parent / "trainers"
_MAIN = 'if __name__ == "__main__":'
_RUNS = re.compile(r"""^if __name__ == ["']__main__["']:.*\bmain\(""", re.MULTILINE | re.DOTALL)


class UnknownName(TraceError):
    """There is no file, method or config of that name; the message says which ones there are."""


def methods() -> dict[str, Path]:
    """The methods of the package: name -> file."""
    return {p.stem: p for p in sorted(TRAINERS.glob("*.py")) if is_method(p)}


def is_method(file: Path) -> bool:
    """Whether a file can be run."""
    return bool(_RUNS.search(file.read_text(encoding="utf-8", errors="replace")))


def configs() -> dict[str, Path]:
    """The configs of the package: name -> file."""
    return {p.stem: p for p in sorted((TRAINERS / "configs").glob("*.yaml"))}


def studies() -> dict[str, Path]:
    """The studies of the package: name -> file."""
    return {p.stem: p for p in sorted((TRAINERS / "configs" / "studies").glob("*.yaml"))}


def tuned() -> dict[str, Path]:
    """The tables of methods' settings of the package, by the size of the model: name -> file."""
    return {p.stem: p for p in sorted((TRAINERS / "configs" / "methods").glob("*.yaml"))}


def about(file: Path) -> str:
    """What a config or study is for: the first sentence of its comment that is no command."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    paragraphs = "\n".join(line[2:] for line in comment).split("\n\n")
    text = next(
        (p for p in paragraphs if not re.search(r" -m trainers\.|\bmake \w|\baccelerate launch", p.partition("\n")[0])),
        "",
    )
    return re.split(r"(?<=[.?:;]) ", " ".join(text.split()))[0].rstrip(":;")


def find(kind: str, name: str, packaged: Mapping[str, Path]) -> Path:
    """The file of a config or study: the user's own file of that path, else the packaged one of that name.

    Args:
        kind: The word for it in the message.
        name: A path, or a name of `packaged`.
        packaged: Name -> file of the package.

    Raises:
        UnknownName: naming what there is.
    """
    if Path(name).is_file():
        return Path(name)
    if name in packaged:
        return packaged[name]
    raise UnknownName(
        f"There is no {kind} {name}: it is not a file, and the package has only {', '.join(packaged)}."
        + suggestion(name, packaged)
    )


class _OnceEach(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; PyYAML would take the last one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} is given twice", problem_mark=node.start_mark)
        return node


def read_yaml(file: str | Path) -> Any:
    """The content of a config, table or study.

    Raises:
        OSError, ValueError, yaml.YAMLError: if it cannot be read, or gives a key twice.
    """
    with open(file, encoding="utf-8") as content:
        return yaml.load(content, _OnceEach)


def find_method(name: str, folder: Path | None = None) -> Path:
    """The file of a method: one of the package by its name, or any by its path (my_method.py) or module (my.method).

    Args:
        name: The name, path or module.
        folder: What a relative path starts from; None = the working directory.

    Raises:
        UnknownName: if there is none, or its file does not run anything.
    """
    own = methods()
    if name in own:
        return own[name]
    file = (folder or Path()) / Path(name).expanduser()
    if not name.endswith(".py"):
        if "." not in name:
            raise UnknownName(
                f"There is no method {name}: the package has {', '.join(own)}. For a method of your own, give its file "
                "(my_method.py) or its module (my_package.my_method)." + suggestion(name, own)
            )
        file = _file_of_module(name)
    if not file.is_file():
        raise UnknownName(f"There is no file {file}: give the file of a method.")
    if not is_method(file):
        raise UnknownName(f"{file} does not start a training: end it with {_MAIN} main(MyTrainer, MyConfig).")
    return file


def _file_of_module(name: str) -> Path:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind all others, so that a folder there cannot hide a package
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        raise UnknownName(f"There is no module {name}: it is not installed, and not in {os.getcwd()}.")
    return Path(spec.origin)
