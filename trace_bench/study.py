"""Studies: a question of the paper as a list of runs that are trained, evaluated and compared.

A study is a YAML file; `trainers/configs/studies/` holds the paper's:

    # The question, on the first line.
    config: {small: ../quickstart.yaml, full: ../llama2_7b_lora.yaml}
    runs:
      few: {method: sequential, train_rows: {small: 16, full: 500}}
      many: {method: sequential, train_rows: {small: 64, full: null}}

`config` is a file relative to the study, or a config of the package by its name. The keys of a run are `method` and
options of it. A method is a name of the package, the path of a file (relative to the study) or a module. Any value may
be {small: X, full: Y}: X by default, Y with `--full`; null leaves the option (or the run) out. A value {each: [X, Y]}
makes a run of every value, and several of them a run of every combination:

    method: {each: [sequential, ewc]}
    seed: {each: [0, 1, 2]}
    tasks: {each: {order1: [order1], order2: [order2]}}

The runs of `lora` are then lora-sequential-seed0-order1 ... Each run is `trace-bench train METHOD` and `trace-bench
evaluate`, which go on where they were; what `trace-bench report` says of all of them comes last.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from trace_bench import packaged
from trace_bench.cli.options import option_words
from trace_bench.ending import for_child, run_child
from trace_bench.keys import refuse_secrets
from trace_bench.report import Results, compare, write_comparison_page, write_reports
from trace_bench.run import Run, read_json
from trace_bench.text import markdown_text, one_line, printable
from trace_tasks.data.files import write_json, write_text
from trace_tasks.errors import TraceError, suggestion

#: The file in the folder of a run with what the study asked of it.
ASKED = "study.json"


class StudyError(TraceError):
    """The study file cannot be used; the message says where, and what is allowed."""


def read_study(file: str | Path, full: bool = False) -> dict[str, tuple[str, list[str]]]:
    """Reads a study file at the small or full scale: run name -> method and command-line arguments.

    Raises:
        StudyError, RunError: naming the place in the file and what is allowed there.
    """
    file, scale = packaged.find("study", str(file), packaged.studies()), "full" if full else "small"
    try:
        study = packaged.read_yaml(file)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise StudyError(f"{file} is not YAML: {e}") from e
    if not isinstance(study, dict) or study.keys() != {"config", "runs"}:
        found = sorted(map(str, study)) if isinstance(study, dict) else type(study).__name__
        raise StudyError(f"{file}: found {found}; a study has the keys config and runs, and no others.")
    refuse_secrets(study, f"{file},")  # they would be shown as arguments of commands
    config = _at(scale, study["config"], f"{file}, config")
    beside = file.parent / str(config)
    try:
        path = beside if beside.is_file() else packaged.find("config", str(config), packaged.configs())
    except packaged.UnknownName as e:
        raise StudyError(f"{file}, config (a file relative to {file.parent}, or a name): {e}") from e
    runs = _at(scale, study["runs"], f"{file}, runs")
    if not isinstance(runs, dict):
        raise StudyError(f"{file}, runs: expected run names with their options, found {runs!r:.60}.")
    commands: dict[str, tuple[str, list[str]]] = {}
    for name, options in _each(runs, scale, f"{file}, runs"):
        where = f"{file}, runs, {name}"
        if name in commands:
            raise StudyError(f"{where}: two runs have this name. Rename one.")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise StudyError(f"{where}: the name becomes a folder, so use only letters, digits, '_', '-' and '.'.")
        if not isinstance(options, dict) or not isinstance(method := options.pop("method", None), str):
            raise StudyError(
                f"{where}: found {options!r:.60}; a run is {{method: NAME or FILE.py, OPTION: VALUE, ...}}."
            )
        try:
            source = packaged.find_method(method, file.parent)
        except packaged.UnknownName as e:
            raise StudyError(f"{where}: {e}") from e
        if method.endswith(".py"):
            method = str(source)
        for key in options:
            if key in ("config", "output_dir") or not re.fullmatch(r"[a-z]\w*", str(key)):
                raise StudyError(
                    f"{where}: {key!r} is not allowed; use method and the options of the method, without '--'."
                )
        arguments = [word for key, value in options.items() for word in option_words(key, value)]
        commands[name] = method, ["--config", os.path.normpath(path), *arguments]
    if not commands:
        raise StudyError(f"{file}: no run has settings for the {scale} scale.")
    return commands


def _each(runs: dict[Any, Any], scale: str, where: str) -> Iterator[tuple[str, Any]]:
    """Name of a run -> its options. A run with values {each: ...} becomes one run for every combination."""
    for name, options in runs.items():
        options = _at(scale, options, f"{where}, {name}")
        if isinstance(options, dict):
            options = {key: _at(scale, value, f"{where}, {name}, {key}") for key, value in options.items()}
            choices = [
                _choices(key, value, scale, f"{where}, {name}, {key}")
                for key, value in options.items()
                if isinstance(value, dict) and "each" in value
            ]
            for chosen in itertools.product(*choices):
                parts = [str(name), *(part for part, _, _ in chosen)]
                yield "-".join(parts), {**options, **{key: value for _, key, value in chosen}}
        elif options is not None:
            yield str(name), options


def _choices(key: str, value: dict[str, Any], scale: str, where: str) -> list[tuple[str, str, Any]]:
    values = _at(scale, value["each"], f"{where}, each")
    of_words = isinstance(values, list) and all(isinstance(v, str | int | float) for v in values)
    if value.keys() != {"each"} or not (of_words or isinstance(values, dict)) or not values:
        raise StudyError(
            f"{where}: found {value!r:.60}; under each use a list of words or numbers, or a mapping of names to "
            "values, and no other key next to each."
        )
    if isinstance(values, dict):
        return [(str(part), key, v) for part, v in values.items()]
    # The file of a method has the name of the method.
    return [((Path(v).stem if v.endswith(".py") else v) if isinstance(v, str) else f"{key}{v}", key, v) for v in values]


def _at(scale: str, value: Any, where: str) -> Any:
    if not isinstance(value, dict) or not value.keys() & {"small", "full"}:
        return value
    if value.keys() != {"small", "full"}:
        raise StudyError(f"{where}: found {sorted(map(str, value))}; give both small and full (null leaves it out).")
    return _at(scale, value[scale], where)


def run_study(
    file: str | Path,
    *,
    full: bool = False,
    output_dir: str | Path | None = None,
    only: Collection[str] | None = None,
    launch: str | None = None,
    dry_run: bool = False,
) -> bool:
    """Does the runs of a study one after the other, prints their comparison and writes it (summary.md, .csv, .html).

    Args:
        file: The study file.
        full: Whether at the scale of the paper.
        output_dir: The folder of the runs; None = runs/<name of the file>-<small or full>.
        only: Names of the runs to do, as in the file or of single ones, or their numbers from 1 on; None = all. The
            comparison has all that are there.
        launch: What starts the trainings instead of this Python, as `accelerate launch --num_processes 8`.
        dry_run: Check the options, and print the commands only.

    Returns:
        Whether every run succeeded. One that fails does not stop the others.
    """
    path = packaged.find("study", str(file), packaged.studies())
    runs, title = read_study(path, full), f"{path.stem}-{'full' if full else 'small'}"
    folder = Path(output_dir or Path("runs") / title)
    chosen = _chosen(file, runs, only or ())
    try:
        start, program = shlex.split(launch) if launch else [sys.executable], ["-m", "trace_bench"]
    except ValueError as e:
        raise StudyError(f"--launch {launch}: a shell cannot read this command ({e}).") from e
    failed: dict[str, str] = {}
    if not dry_run:
        folder.mkdir(parents=True, exist_ok=True)  # where that cannot be, no run can begin
    begun = {name for name in runs if (folder / name / "manifest.json").exists()}
    new = {name: run for name, run in runs.items() if name in chosen and name not in begun}
    if dry_run or len(new) > 1:  # one that begins at once says it itself, as quickly
        _refuse_options(path, new)
    for name, (method, arguments) in runs.items():
        if name not in chosen:
            continue
        commands = {
            "training": [*start, *program, "train", method, *arguments, "--output_dir", str(folder / name)],
            "evaluation": [sys.executable, *program, "evaluate", str(folder / name)],
        }
        if dry_run:
            print("\n".join(printable(shlex.join(command)) for command in commands.values()))
        elif why := _do(folder / name, commands, _asked(method, arguments)):
            failed[name] = why
    if not dry_run:
        question = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        head = f"# {title}\n\n{question}\n\n"
        print(printable(_summary(head, folder, runs, failed)), end="")
    return not failed


def _do(folder: Path, commands: dict[str, list[str]], asked: Any) -> str | None:
    """Does the steps of a run, and writes what was `asked` before them; returns why it failed."""
    for step, command in commands.items():
        print(f"--- {folder.name}: {step}", flush=True)
        if code := run_child(command):
            return f"{step} ended with exit code {code}"
        if step == "training":
            write_json(folder / ASKED, asked)
    return None


def _refuse_options(file: Path, runs: dict[str, tuple[str, list[str]]]) -> None:
    """Refuses unknown options of all trainings before the first run begins."""
    asked = {name: (str(packaged.find_method(method)), words) for name, (method, words) in runs.items()}
    command = [sys.executable, "-m", "trainers.commands.options"]
    answer = subprocess.run(command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, env=for_child())
    if answer.returncode:
        raise StudyError(
            f"Could not check the options of the runs (exit code {answer.returncode}): see the error above."
        )
    if refused := json.loads(answer.stdout):
        raise StudyError("\n".join(f"{file}, runs, {name}: {why}" for name, why in refused.items()))


def _chosen(file: str | Path, runs: Collection[str], only: Collection[str]) -> Collection[str]:
    """The runs that `only` names; None = all."""
    numbers = {str(i): name for i, name in enumerate(runs, 1)}
    # A name with {each: ...} stands for all of its runs: ewc for ewc-seed0 and ewc-seed1.
    named = {word: [name for name in runs if name == word or name.startswith(f"{word}-")] for word in only}
    chosen = {name for word, found in named.items() for name in found or [numbers.get(word, word)]}
    if unknown := sorted(chosen - set(runs)):
        raise StudyError(
            f"--only {' '.join(unknown)}: no such run. Use {', '.join(runs)}, or their numbers 1 to {len(runs)} in "
            f"{file}." + "".join(suggestion(name, runs) for name in unknown)
        )
    return chosen or runs


def _asked(method: str, arguments: list[str]) -> Any:
    """What a study asks of a run: its method, its options, and the content of the config."""
    _, config, *options = arguments
    content = None
    with suppress(OSError, ValueError, yaml.YAMLError):  # of which the training says more
        content = packaged.read_yaml(config)
    return json.loads(json.dumps([method, options, content], default=str, skipkeys=True))


def _summary(head: str, folder: Path, runs: dict[str, tuple[str, list[str]]], failed: dict[str, str]) -> str:
    """Writes the report of every run and the comparison of all; adds errors of runs to `failed`."""
    there, missing, older = [], [], []
    for name, asked in runs.items():
        if not (folder / name / "manifest.json").exists():
            missing.append(name)
            continue
        try:
            run = Run.open(folder / name)
            _ = Results(run).cells  # those of a damaged run cannot bound the others
            if (run.path / ASKED).exists() and read_json(run.path / ASKED) != _asked(*asked):
                older.append(f"`{name}`")
            there.append(run)
        except TraceError as e:
            failed.setdefault(name, str(e))
    loaded = []
    for run, made in zip(there, write_reports(there), strict=True):
        if isinstance(made, TraceError):
            failed.setdefault(run.path.name, str(made))
        else:
            loaded.append(made[1])
    lines = [one_line(f"**Failed:** `{name}`: {why}.") for name, why in failed.items()]
    undone = [f"`{name}`" for name in missing if name not in failed]
    lines += [f"Not done: {', '.join(undone)}."] if undone else []
    lines += [f"**Trained with other settings** than the study has now: {', '.join(older)}."] if older else []
    text = head + "".join(f"> {line}\n\n" for line in lines)
    written = head + "".join(f"> {markdown_text(line)}\n\n" for line in lines)
    if loaded:
        comparison = compare(loaded)
        write_text(folder / "summary.csv", comparison.csv())
        write_comparison_page(comparison, folder / "summary.html", text)
        written += comparison.markdown()
    write_text(folder / "summary.md", written)
    return written
