"""A leaderboard from the result files of many runs: one table per protocol, the best OP first.

It reads nothing but those small files, so that runs of other people and of other machines can stand in it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trace_bench import shapes
from trace_bench.metrics import Estimate
from trace_bench.report import html
from trace_bench.report.entry import OF_TASKS, SCORES
from trace_bench.report.likelihood import NATS
from trace_bench.report.result_file import FILE, VERSION
from trace_bench.report.results import DELTAS, UNKNOWN
from trace_bench.report.tables import DASH, PERCENT, Table, Unit, count, csv_text, markdown, number, value_text
from trace_bench.run import RunError
from trace_bench.text import markdown_text, one_line, word
from trace_tasks.data import ORDERS, reading, task_name
from trace_tasks.data.files import write_text
from trace_tasks.errors import DataError

#: What a run was trained with; what all runs of a table share is said above it.
TEXTS = ("method", "trains", "train rows", "epochs", "seed")
COSTS = {"training min": number, "trained tokens": count}
SOFT = "soft BWT"
_NONE = (UNKNOWN, PERCENT, False)
#: Larger tables than of other pages, since a table is all that there is.
MOST_CELLS = 100_000
#: A result file has a few KB.
MOST_BYTES = 2**20


@dataclass(frozen=True)
class Line:
    """A run of the leaderboard."""

    name: str
    file: Path
    content: Mapping[str, Any]

    @cached_property
    def texts(self) -> dict[str, str]:
        """Those of `TEXTS`."""
        training, seed = self.content["training"], self.content.get("seed")
        rows, epochs, listed = training.get("rows"), training.get("epochs"), ""
        if isinstance(epochs, list):
            listed = ", ".join(f"{e:g}" if isinstance(e, float) else str(e) for e in epochs)
        elif isinstance(epochs, int | float):
            listed = f"{epochs:g}"
        elif isinstance(steps := training.get("max_steps"), int):
            listed = f"{steps} steps"
        return {
            "method": self.content["method"],
            "trains": self.content["trains"],
            "train rows": f"first {rows}" if rows else "all",
            "epochs": listed or DASH,
            "seed": DASH if seed is None else str(seed),
        }

    @cached_property
    def estimates(self) -> dict[str, tuple[Estimate, Unit, bool]]:
        """Column of a score, another measure or a task -> its estimate, its unit, and whether it has a sign."""
        unit = _unit(self.content["unit"])
        units = {**dict.fromkeys(OF_TASKS, unit), SOFT: NATS}
        found = {
            name: (_estimate(score), units.get(name, PERCENT), SCORES[name])
            for name, score in self.content["scores"].items()
            if name in SCORES
        }
        found |= {name: (_estimate(score), Unit("", None), True) for name, score in self.content["measures"].items()}
        return found | {_column(task): (_estimate(s), _unit(s), False) for task, s in self.content["tasks"].items()}

    def costs(self) -> dict[str, float]:
        """Those of `COSTS` that are known."""
        training = self.content["training"]
        found = {"training min": training.get("minutes"), "trained tokens": training.get("tokens")}
        return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}

    @property
    def rank(self) -> tuple[float, str]:
        """The best OP first, runs without one last."""
        op, unit, _ = self.estimates.get("OP", _NONE)
        return (math.inf if math.isnan(op.value) else -unit.sign * op.value, self.name)


@dataclass(frozen=True)
class Group:
    """The runs of one protocol."""

    protocol: Mapping[str, Any]
    lines: list[Line]

    def table(self) -> Table:
        """A row a run."""
        texts = [key for key in TEXTS if len({line.texts[key] for line in self.lines}) > 1 or key == "method"]
        same = [f"{key} {self.lines[0].texts[key]}" for key in TEXTS if key not in texts]
        known = dict.fromkeys(name for line in self.lines for name in line.estimates)
        names = [name for name in SCORES if name in known] + [name for name in known if name not in SCORES]
        rows = []
        for line in self.lines:
            cells = [line.texts[key] for key in texts]
            for name in names:
                estimate, unit, sign = line.estimates.get(name, _NONE)
                cells.append(unit.with_interval(estimate, sign))
            costs = line.costs()
            rows.append([line.name, *cells, *(write(costs.get(key, math.nan)) for key, write in COSTS.items())])
        units = [unit for line in self.lines for name, (_, unit, _) in line.estimates.items() if name != SOFT]
        about = "in percent" if all(unit.is_percent for unit in units) else "in percent or the unit of the task"
        about += f", {SOFT} in {NATS.metric}" if SOFT in names else ""
        about += ", in brackets 95 % intervals over test rows"
        about += f" (in all: {', '.join(same)})" if same else ""
        return Table(["run", *texts, *names, *COSTS], rows, about=about).without_empty_columns()

    def facts(self) -> str:
        """The protocol in a sentence."""
        p, shown = self.protocol, ("data", "test rows", "examples in the prompt", "chat template", "backend")
        tasks, listed = _tasks_text(str(p.get("tasks"))), "; ".join(f"{key} {_field_text(p.get(key))}" for key in shown)
        return f"Base model `{one_line(str(p.get('base model')))}`; tasks {tasks}; {listed}; BWT {p.get('bwt rule')}."


def _tasks_text(tasks: str) -> str:
    names = tasks.split(", ")
    order = next((name for name, those in ORDERS.items() if those == names), None)
    return one_line(f"{len(names)} ({order})" if order else ", ".join(map(task_name, names)))


def _field_text(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value_text(value) or "none"


def _unit(content: Mapping[str, Any] | None) -> Unit:
    if content is None:
        return PERCENT
    return Unit(content["metric"], content["scale"], content["higher_is_better"])


def _estimate(content: Mapping[str, Any]) -> Estimate:
    return Estimate(*(math.nan if (v := content.get(key)) is None else float(v) for key in ("value", "low", "high")))


def _column(task: str) -> str:
    name = task_name(task)
    return f"task {task}" if name in ("run", *TEXTS, *SCORES, *COSTS) else name


# ---------------------------------------------------------------------------------------------------------- the files


#: What makes a folder one of a model or an adapter.
_CHECKPOINT = {"config.json", "adapter_config.json", "tokenizer_config.json", "trainer_state.json"}


def find(folder: Path) -> Iterator[Path]:
    """The files that may be results: of a run or a model its result.json alone, elsewhere each *.json."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        if "manifest.json" in files:  # a run: its other files are no results, and there are many
            folders.clear()
            files = [FILE]
        elif not _CHECKPOINT.isdisjoint(files):  # its own files, of a training's many checkpoints, need not be named
            files = [name for name in files if name == FILE]
        yield from (Path(place) / name for name in sorted(files) if name.endswith(".json"))


def read(folder: Path) -> tuple[list[Line], list[str]]:
    """The runs whose results lie below a folder, and one line for each file that is none.

    Raises:
        RunError: if the folder is not there, or nothing in it is a result.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder. Give one that has the result files of runs.")
    found, skipped = [], []
    for file in find(folder):
        if not file.exists():
            skipped.append(f"{file.parent} has no {FILE}. To write it: trace-bench report {word(file.parent)}")
            continue
        try:
            content = reading.strict(reading.read_file(file, MOST_BYTES).decode("utf-8"), None)
            reading.check(shapes.Result, content)
            found.append((file, one_line(content)))
        except (ValueError, RecursionError, DataError, OSError) as e:  # ValueError: no UTF-8, no JSON, something else
            skipped.append(" ".join(f"{file} is not a result file of version {VERSION}: {e}".splitlines()))
    if not found:
        problem = f"{folder} has no result files. To write {FILE} of a run: trace-bench report RUN"
        raise RunError("\n".join([problem, *skipped]))
    return [Line(content["run"], file, content) for file, content in found], skipped


def leaderboard(folder: str | Path) -> Leaderboard:
    """The leaderboard of all result files below a folder (see `read`).

    Runs are grouped by protocol, the largest group first, in each the best OP; files tell runs of one name apart.
    """
    folder = Path(folder)
    lines, skipped = read(folder)
    found: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.rank):
        found.setdefault(json.dumps(line.content["protocol"], sort_keys=True), []).append(line)
    groups = []
    for those in found.values():
        names = [line.name for line in those]
        for i, line in enumerate(those):
            if names.count(line.name) > 1:
                place = line.file.parent if line.file.name == FILE else line.file.with_suffix("")
                those[i] = replace(line, name=one_line(str(place.relative_to(folder))))
        groups.append(Group(those[0].content["protocol"], those))
    return Leaderboard(sorted(groups, key=lambda group: -len(group.lines)), skipped)


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """The fields in which two protocols differ, with both values where a reader can tell them apart."""
    found = []
    for key in dict.fromkeys([*one, *two]):
        a, b = one.get(key), two.get(key)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping) and key.endswith("tasks"):
            names = [task_name(task) for task in dict.fromkeys([*a, *b]) if a.get(task) != b.get(task)]
            if not a or not b:
                found.append(f"{key} (of one not on record)")
            elif set(a) == set(b):  # else the tasks say it
                found.append(f"{key} ({', '.join(names)})")
        elif key == "predictions":  # a digest, which tells a reader nothing
            found.append("predictions (those of an import whose base model or prompts are not known)")
        else:
            texts = [_tasks_text(str(v)) if key == "tasks" else _field_text(v) for v in (b, a)]
            found.append(f"{key} ({texts[0]} against {texts[1]})")
    return list(map(one_line, found))


# ----------------------------------------------------------------------------------------------------------- renderings


@dataclass(frozen=True)
class Leaderboard:
    """The results below a folder."""

    groups: list[Group]
    skipped: list[str]

    def parts(self) -> Iterator[tuple[str, Group]]:
        """Each group with its head: Markdown."""
        for place, group in enumerate(self.groups, 1):
            head = f"## Protocol {place}: {len(group.lines)} run{'s' * (len(group.lines) > 1)}\n\n{group.facts()}"
            if place > 1:
                fields = "; ".join(differing(self.groups[0].protocol, group.protocol))
                head += f"\n\nNot comparable with protocol 1 in {fields}."
            made = [line.content.get("made_with", {}) for line in group.lines]
            # The second is that of older programs, which cannot be compared with the first.
            scoring = [{str(m[k]) for m in made if k in m} for k in ("code of the scoring", "scoring code")]
            if (number := max(map(len, scoring))) > 1:
                states = f"{number} states of the scoring code"
                head += f"\n\nScored by {states}, with the same versions of the tasks."
            for name in DELTAS:
                ways = [line.content.get("delta_conditions", {}).get(name) for line in group.lines]
                if len({way for way in ways if way}) > 1:
                    head += f"\n\n**Not comparable** in {name}: measured on different rows, or by different judges."
            yield head, group

    def markdown(self) -> str:
        """All tables as Markdown."""
        blocks = []
        for head, group in self.parts():
            table = group.table()
            blocks += [markdown_text(head), f"Scores {markdown_text(table.about)}:", markdown(table)]
        return "\n\n".join(blocks) + "\n"

    def csv(self) -> str:
        """A line a run, numbers as they are shown but not rounded, and the protocol's fields."""
        lines: list[dict[str, Any]] = []
        for place, group in enumerate(self.groups, 1):
            for line in group.lines:
                numbers: dict[str, Any] = {"protocol": place, "run": line.name, **line.texts}
                for name, (estimate, unit, _) in line.estimates.items():
                    for end, value in zip(("", " low", " high"), estimate, strict=True):
                        numbers |= {f"{name}{end}": unit.factor * value} if value == value else {}
                fields = {key: v if isinstance(v, str | int) else json.dumps(v) for key, v in group.protocol.items()}
                lines.append(numbers | line.costs() | fields)
        return csv_text(list(dict.fromkeys(key for line in lines for key in line)), lines)

    def page(self, file: Path) -> str:
        """One page, whose tables can be sorted by a click on a head."""
        view = partial(html.table_view, elsewhere="the .md and .csv", most=MOST_CELLS, sortable=True)
        parts = {}
        for place, (head, group) in enumerate(self.parts(), 1):
            reports = {line.name: line.file.with_name("report.html") for line in group.lines if line.file.name == FILE}
            table, links = group.table(), html.links(reports, file.parent)
            parts[f"protocol-{place}"] = [html.text_html(f"{head}\n\nScores {table.about}."), view(table, links)]
        runs = sum(len(group.lines) for group in self.groups)
        about = f"{runs} runs, the best OP first. Only runs in the same table have the same protocol."
        return html.document(
            title=file.stem,
            head=[html.text_html(f"# {one_line(file.stem)}\n\n{about}")],
            parts=parts,
            wide=True,
            sortable=True,
            foot=Markup("Made by <code>trace-bench results</code> from the result files of the runs."),
        )


ENDINGS = (".md", ".csv", ".html")


def write_leaderboard(board: Leaderboard, output: str | Path) -> None:
    """Writes a leaderboard in the form of the output's ending, one of `ENDINGS`."""
    file = Path(output)
    forms = {".md": board.markdown, ".csv": board.csv, ".html": lambda: board.page(file)}
    write_text(file, forms[file.suffix]())
