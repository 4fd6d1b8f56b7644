"""The documentation: its commands parse, files that it names exist, and no link is broken. No command is started."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
from made_runs import TASKS
from markdown_it import MarkdownIt
from markdown_it.token import Token

from trace_bench import evaluate, packaged, report
from trace_bench.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("docs/*.md"), *ROOT.glob("trace_tasks/*.md")))
PAGES += ["README.md", "CONTRIBUTING.md"]
#: What begins a command in prose; a path of the repository; what stands for a name of the reader's in it.
PROGRAM = re.compile(r"(?:make|trace-bench|python -m|lm_eval) ")
PATH = re.compile(r"(?:trainers|tests|trace_tasks|trace_bench|judges|bench|docs|requirements|\.ci)/[\w./-]+")
PLACEHOLDER = re.compile(r"\b(?:NAME|FILE|METHOD|TASK)\b")


@cache
def tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def inline(page: str, kind: str) -> Iterator[Token]:
    for token in tokens(page):
        yield from (child for child in token.children or [] if child.type == kind)


def commands(page: str) -> Iterator[list[str]]:
    """Every command of the shell blocks and the prose, without comments and leading variables."""
    blocks = [t.content for t in tokens(page) if t.type == "code_block" or (t.type == "fence" and t.info == "sh")]
    prose = [t.content for t in inline(page, "code_inline") if PROGRAM.match(t.content)]
    for line in "\n".join([*blocks, *prose]).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            if command:
                yield command


@cache
def output(*command: str) -> str:
    """The output of a command that starts nothing. It must succeed."""
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@cache
def helped(*command: str) -> str:
    """The help of one of our commands, made in this process to save time."""
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        main([*command, "--help"])
    return out.getvalue()


def options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def unknown(words: list[str], text: str) -> set[str]:
    """Options that the help of a command does not have."""
    return options(words) - set(re.findall(r"(?<![\w-])--[\w-]+", text)) - {"--help"}


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, given, _ = word.partition("=")
        assert not given or re.search(rf"\$\({name}\)|^{name} \?=", makefile, re.MULTILINE), f"{name} is not used"
        if name.endswith("-train"):
            assert (ROOT / "trainers" / f"{name.removesuffix('-train')}.py").is_file(), name
    # Lines with $(MAKE) are run even by `make -n`: by a shell that does nothing.
    output("make", "-n", "SHELL=/bin/true", "DEVICE=cpu", *words)


def check_python(words: list[str]) -> None:
    """Checks `python FILE` and `python -m MODULE`, also after a launcher."""
    if "-m" not in words:
        text = (ROOT / words[0]).read_text()
        assert all(f'"{option}"' in text for option in options(words)), words
        return
    module, *rest = words[words.index("-m") + 1 :]
    if module.startswith("trainers.") and module.partition(".")[2] in packaged.methods():
        assert not unknown(rest, helped("train", module.partition(".")[2])), words
    elif module.startswith(("trainers.", "trace_tasks.")):
        assert not unknown(rest, output(sys.executable, "-m", module, "--help")), words
    elif module.startswith("bench."):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def check_trace_bench(words: list[str]) -> None:
    end = next((i for i, word in enumerate(words) if word.startswith("-") or word != word.lower()), len(words))
    command = words[:2] if words[:2] == ["data", "audit"] else words[: min(end, 1)]
    if command == ["train"] and end > 1:
        command = ["train", words[1] if words[1] in packaged.methods() else "sequential"]
        config = words[words.index("--config") + 1] if "--config" in words else "FILE"
        assert config == "FILE" or config in packaged.configs(), words
    assert not unknown(words, helped(*command)), words


CHECKS = {
    "make": check_make,
    "python": check_python,
    "accelerate": check_python,
    "torchrun": check_python,
    "trace-bench": check_trace_bench,
    "lm_eval": lambda words: unknown(words, output(str(Path(sys.executable).with_name("lm_eval")), "run", "--help")),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_each_page_parse(page):
    for program, *words in commands(page):
        check = CHECKS.get(Path(program).name)
        if check and "..." not in words and not any("<" in word for word in words):
            assert not check(words), f"{program} {shlex.join(words)}"
        for path in PATH.findall(shlex.join([program, *words])):
            assert PLACEHOLDER.search(path) or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_documentation_exist(page):
    for code in inline(page, "code_inline"):
        path = code.content
        if PATH.fullmatch(path) and Path(path).suffix and not PLACEHOLDER.search(path):
            assert (ROOT / path).exists(), path


@cache
def anchors(page: str) -> set[str]:
    """The anchors of headings, in the form that both the repository and the site use."""
    found = set()
    for heading, content in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(child.content for child in content.children or []).lower()
            kept = re.sub(r"[^\w\s-]", "", text).strip()
            found |= {kept.replace(" ", "-")} & {re.sub(r"[-\s]+", "-", kept)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_in_the_documentation_lead_somewhere(page):
    links = [t.attrs["href"] for t in inline(page, "link_open")] + [t.attrs["src"] for t in inline(page, "image")]
    for link in map(str, links):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent.joinpath(file).resolve() if file else ROOT / page
        assert target.is_file(), f"{link}: no such file"
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), f"{link}: no such heading"


def test_every_page_of_the_documentation_is_linked():
    index = {str(t.attrs["href"]) for t in inline("docs/index.md", "link_open")}
    assert {p.removeprefix("docs/") for p in PAGES if p.startswith("docs/")} - {"index.md"} <= index


def test_python_examples_run_and_print_the_documented_output(make, monkeypatch, capsys):
    """The examples get a run written by hand. Slow functions are replaced by ones with the same signatures."""
    scores = {metric: np.arange(12).reshape(3, 4) / 20 for metric in ("accuracy", "log_likelihood")}
    run = make(rows=dict.fromkeys(TASKS, scores))
    for slow in (evaluate.evaluate, report.write_report):
        monkeypatch.setattr(sys.modules[slow.__module__].__package__ + f".{slow.__name__}", create_autospec(slow))
    (code,) = (t.content for t in tokens("docs/getting-started.md") if t.type == "fence" and t.info == "python")
    found: dict[str, object] = {}
    exec(code.replace("runs/mine", str(run.path)), found)
    said = capsys.readouterr().out.splitlines()
    assert [float(word) for word in said[1].split()] == pytest.approx([0.35, 0.075, 0.05])
    assert found["soft"] == pytest.approx(0.075) and len(found["samples"]) == 3
    written = [float(number) for number in code.rstrip().rpartition("# ")[2].split(", ")]
    assert [float(word) for word in said[2].split()] == pytest.approx(written)


def test_make_asks_for_a_run_if_none_is_named():
    """The default of RUN for trainings contains the name of the target. These targets have no default."""
    for given in ([], ["RUN="]):
        for target in ("evaluate", "judge", "report"):
            done = subprocess.run(["make", "-n", target, *given], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode and f"make {target} RUN=runs/NAME" in done.stderr
    assert "report runs/x" in output("make", "-n", "report", "RUN=runs/x")
