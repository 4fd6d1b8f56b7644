"""The section about the options that a model chooses: their distribution over the stages, and those that vanish."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from trace_bench.measures import choices as measures
from trace_bench.report.drawing import clipped
from trace_bench.report.entry import Entry, column_of
from trace_bench.report.results import Results
from trace_bench.report.rows import Choices
from trace_bench.report.tables import DASH, Block, Table, percent, stage_label
from trace_bench.report.transitions import title
from trace_bench.text import one_line

_ABOUT = (
    "## Chosen options\n\nHow often the model chooses each option, in percent of the answers that name one, next to "
    "the gold labels of all rows. None: answers in which no option can be read, in percent of all answers. Distance: "
    "total variation, half the sum of the differences to the gold labels. It is the smallest share of answers that "
    "would have to change, so that the model chooses each option as often as it is right. A distance of 0 does not "
    "mean that the answers are right."
)


def sections(results: Results) -> Iterable[Block]:
    """What collapsed, in words, and a table for each task and suite with options."""
    if not results.choices:
        return
    yield _ABOUT
    if said := [line for name, choices in results.choices.items() for line in _collapses(results, name, choices)]:
        yield "**Collapsed:**\n\n" + "\n".join(f"- {line}" for line in said)
    for name, choices in results.choices.items():
        yield f"### Options of {title(name)}"
        rows = [["gold labels", *map(percent, measures.shares(choices.gold, len(choices.labels))), DASH, DASH]]
        for stage, chosen in choices.chosen.items():
            of_model = measures.shares(chosen, len(choices.labels))
            numbers = [*of_model, float((chosen < 0).mean()), _distance(choices, stage)]
            rows.append([results.run.stages[stage].name, *map(percent, numbers)])
        yield Table(["stage", *_labels(choices), "none", "distance"], rows)


def _collapses(results: Results, name: str, choices: Choices) -> Iterable[str]:
    """Sentences about the options that vanish, and those that take all but a few answers, each with its stages."""
    labels, gold = _labels(choices), measures.shares(choices.gold, len(choices.labels))
    events: dict[tuple[bool, int], list[int]] = {}
    for stage, chosen in choices.chosen.items():
        vanished, dominant = measures.collapse(chosen, choices.gold, len(choices.labels))
        for option in vanished:
            events.setdefault((False, option), []).append(stage)
        if dominant is not None:
            events.setdefault((True, dominant), []).append(stage)
    for (takes_all, option), stages in sorted(events.items()):
        found = [results.run.stages[i] for i in stages]
        where = ", ".join(f"{stage.number} ({one_line(stage_label(stage))})" for stage in found)
        what = f"takes at least {100 * measures.MOST:.0f} % of the answers" if takes_all else "is never chosen"
        yield (
            f"{title(name)}: `{labels[option]}` {what} at stage{'s' * (len(stages) > 1)} {where}; of the gold "
            f"labels it is {percent(gold[option])} %."
        )


def _labels(choices: Choices) -> list[str]:
    return [clipped(one_line(label).replace("`", "'"), 24) for label in choices.labels]


def _distance(choices: Choices, stage: int) -> float:
    of_model, gold = (measures.shares(x, len(choices.labels)) for x in (choices.chosen[stage], choices.gold))
    return measures.distance(of_model, gold)


def table_of_runs(entries: Iterable[Entry]) -> Table:
    """How far the options that several runs choose in the end are from the gold labels."""
    found = {
        e.name: {
            column_of(name, e.run) if name in e.run.tasks else title(name): percent(_distance(c, max(c.chosen)))
            for name, c in e.results.choices.items()
        }
        for e in entries
    }
    columns = list(dict.fromkeys(column for of_run in found.values() for column in of_run))
    rows = [[name, *(of_run.get(column, DASH) for column in columns)] for name, of_run in found.items()]
    about = (
        "total variation in percent, at the last stage that measured the task; 0: each option as often as it is right"
    )
    return Table(["run", *columns], rows, "Distance of the chosen options to the gold labels", about)


def scores(results: Results) -> Iterable[list[Any]]:
    """The lines of scores.csv: the share of answers that name no option, and the distance to the gold labels."""
    for name, choices in results.choices.items():
        for stage, chosen in choices.chosen.items():
            far = _distance(choices, stage)
            named = {"no_option": float((chosen < 0).mean()), "distance_to_gold": None if np.isnan(far) else far}
            for metric, value in named.items():
                yield [results.run.stages[stage].name, name, metric, value, None, len(chosen), 0, None, None]
