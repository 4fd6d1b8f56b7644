"""The section on how far the stages are from the base model, and how much they forgot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from trace_bench import records
from trace_bench.measures.distance import rank_correlation
from trace_bench.metrics import Estimate, mean_difference
from trace_bench.records import NEUTRAL
from trace_bench.report.entry import Entry
from trace_bench.report.results import UNKNOWN, Results, measured
from trace_bench.report.tables import PERCENT, Block, Table, Unit

NATS = Unit("nats", scale=None, higher_is_better=False)
#: Fewer points than these have no rank correlation that says anything.
_ENOUGH = 5


class Distance(NamedTuple):
    """The distance of a stage on a set of prompts."""

    kl: Estimate
    """Nats per token, with the interval over prompts."""
    unseen: float
    """The share of the base model's probability that the bound does not tell apart."""
    n: int
    settings: dict[str, Any]


class Point(NamedTuple):
    """A stage: how far it is on the prompts of its own task and on neutral ones, and what it forgot (-BWT)."""

    stage: int
    own: Estimate
    neutral: Estimate
    forgetting: Estimate


def distances(results: Results) -> dict[tuple[int, str], Distance]:
    """(stage, set of prompts) -> its distance; those of an older checkpoint or of other answers are left out."""
    run, found = results.run, {}
    for stage in run.stages[1:]:
        if not stage.is_trained:
            continue
        for name in filter(None, (stage.task, NEUTRAL)):
            there, base = records.read_distance(stage, name), records.read_distance(run.stages[0], name)
            if there is None or not there["n"]:
                continue
            checkpoint = results.training.get(stage.index, there)["checkpoint"]  # of one from elsewhere its own
            if records.is_distance_valid(there, base, checkpoint):
                kl, unseen = (np.array([np.mean(row) for row in there[key]]) for key in ("kl", "unseen"))
                mean = mean_difference(kl, fractions=False)
                found[stage.index, name] = Distance(mean, float(unseen.mean()), len(kl), there["settings"])
    return found


def points(results: Results) -> list[Point]:
    """The stages of a run that have a distance."""
    run, found = results.run, results.once(distances)

    def of(index: int, name: str | None) -> Estimate:
        return found[index, name].kl if name and (index, name) in found else UNKNOWN

    bwt = results.sequence["BWT"] if results.is_sequential else [UNKNOWN] * len(run.stages)
    stages = measured(run, found)
    return [Point(s.index, of(s.index, s.task), of(s.index, NEUTRAL), -bwt[s.index - 1]) for s in stages]


def correlations(found: Sequence[Point]) -> str:
    """The rank correlations of distance and forgetting, where there are enough points."""
    texts = []
    for name, where in (("own", "the own task's prompts"), ("neutral", "neutral questions")):
        pairs = [(getattr(point, name).value, point.forgetting.value) for point in found]
        pairs = [pair for pair in pairs if not math.isnan(sum(pair))]
        if len(pairs) >= _ENOUGH and not math.isnan(rho := rank_correlation(*zip(*pairs, strict=True))):
            texts.append(f"{rho:+.2f} on {where} ({len(pairs)} points)")
    return f"Rank correlation (Spearman) of distance and forgetting: {'; '.join(texts)}." if texts else ""


def sections(results: Results) -> Iterable[Block]:
    """The distance and the BWT of each stage."""
    run, found, unit = results.run, results.once(distances), results.unit or PERCENT
    if not found:
        return
    settings, shown = next(iter(found.values())).settings, points(results)
    yield (
        f"## Distance from the base model\n\nKL(base || stage) in nats per token, at the first {settings['tokens']} "
        f"tokens of the base model's own answers to {_sizes(found, False)} test prompts of the stage's task and to "
        f"{_sizes(found, True)} neutral questions (arXiv 2509.04259). In brackets: 95 % intervals over the prompts. "
        "**How to read it:** the farther a stage is from the base model, the more forgetting is expected. Compare "
        "methods on the prompts of the new task. Compare stages on the neutral questions, which are the same at all "
        "stages."
    )
    rows = []
    for index, own, neutral, forgetting in shown:
        stage = run.stages[index]
        shares = [found[index, n].unseen if n and (index, n) in found else math.nan for n in (stage.task, NEUTRAL)]
        bwt = unit.with_interval(-forgetting, sign=True)
        rows.append([stage.name, *map(NATS.with_interval, (own, neutral)), *map(PERCENT.text, shares), bwt])
    head = ["stage", "own task", "neutral", "unseen, own", "unseen, neutral", "BWT_t"]
    yield Table(head, rows).without_empty_columns()
    note = (
        f"These are lower bounds: the {settings['likeliest']} tokens that are most likely for the base model count one "
        "by one, and all others count as one token. Unseen: the share of these others in the base model's probability, "
        "in percent. The missing part is this share times the divergence within them."
    )
    yield f"{note} {correlations(shown)}".strip()


def _sizes(found: dict[tuple[int, str], Distance], neutral: bool) -> str:
    return " or ".join(sorted({str(d.n) for (_, name), d in found.items() if (name == NEUTRAL) == neutral})) or "no"


def scores(results: Results) -> Iterable[list[Any]]:
    """Lines of scores.csv."""
    for (index, name), d in results.once(distances).items():
        ends = (None if math.isnan(x) else x for x in d.kl[1:])
        yield [results.run.stages[index].name, name, "kl_from_base", d.kl.value, None, d.n, 0, *ends]


def last_points(entries: Iterable[Entry]) -> dict[str, Point]:
    """Name of a run -> its last stage, of the runs that have its distance."""
    found = {e.name: points(e.results) for e in entries}
    last = {e.name: len(e.run.stages) - 1 for e in entries}
    return {name: of[-1] for name, of in found.items() if of and of[-1].stage == last[name]}


def table_of_runs(entries: Sequence[Entry]) -> Table:
    """The distance of the last stage of each run."""
    found = last_points(entries)
    rows = [[name, *map(NATS.with_interval, point[1:3])] for name, point in found.items()]
    about = (
        "KL(base || last stage) in nats per token, on the prompts of its own task and on neutral questions; the "
        "larger, the more forgetting is expected"
    )
    if text := correlations(list(found.values())):
        about += f". {text.rstrip('.')}"
    return Table(["run", "own task", "neutral"], rows, "Distance from the base model", about).without_empty_columns()
