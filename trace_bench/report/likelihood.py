"""The section about the log-likelihood of the reference answers: soft forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from trace_bench import metrics
from trace_bench.measures.likelihood import LIKELIHOOD, rows_needed, share_of_gain
from trace_bench.metrics import Estimate, Matrix
from trace_bench.report.results import UNKNOWN, Results
from trace_bench.report.tables import DASH, Block, Table, Unit, count
from trace_tasks.data import task_name

NATS = Unit("nats per token", scale=None)
#: The explanation of BWT_t in a table.
BWT = "mean change of a task since its own stage (divided by t-1); negative = forgetting"


def soft_changes(results: Results, t: int) -> list[Estimate]:
    """What the log-likelihoods of the tasks before stage t gained since their own stages, in nats per token."""
    L, found = results.matrix(LIKELIHOOD), []
    for i, task in enumerate(results.run.tasks[: t - 1]):
        of_rows = metrics.mean_difference(results.rows_since_own(task, t, LIKELIHOOD), fractions=False)
        found.append(of_rows._replace(value=float(L[t, i] - L[i + 1, i])))
    return found


def soft_bwt(results: Results, t: int) -> Estimate:
    """BWT_t of the log-likelihoods; NaN where some are missing."""
    return metrics.mean_of(soft_changes(results, t)) if results.is_sequential else UNKNOWN


def sections(results: Results) -> Iterable[Block]:
    """The second matrix, what of it was forgotten, and how many test rows it takes to see that."""
    run, L = results.run, results.matrix(LIKELIHOOD)
    if np.isnan(L).all():
        return
    yield (
        "## Likelihood of the reference answers\n\nRows: the model after a stage. Columns: tasks. The numbers are the "
        "mean log-probability of a token of the reference answer, with EOS, in nats per token (minus the training loss "
        "of these rows). 0 is certainty; 0.69 less halves the probability of every token. The likelihood changes "
        "before an answer does, so a fall here is forgetting that a score may not show yet."
    )
    yield Table(["stage", *map(task_name, run.tasks)], [[s.name, *map(_nats, L[s.index])] for s in run.stages])
    t = results.last_stage
    if t > 1:
        ends = [results.intervals.get((t, task, LIKELIHOOD), ()) for task in run.tasks[:t]]
        op = metrics.mean_of([Estimate(float(value), *end) for value, end in zip(L[t, :t], ends, strict=True)])
        op_row = [f"OP_{t}", NATS.with_interval(op), f"mean of the {t} tasks seen, at stage {t}"]
        bwt_row = [f"BWT_{t}", NATS.with_interval(soft_bwt(results, t), sign=True), BWT]
        yield Table(["", NATS.plain, ""], [op_row, bwt_row])
        yield (
            f"Change from the task's own stage to stage {t}, in nats per token. **Share**: the change as a share of "
            "the gain in the own stage; -100 %: the whole gain is lost. **Rows needed**: the number of test rows of "
            "each task with which four of five tests show the loss (paired t-test at 5 %), by the likelihood and by "
            "the headline score; –: nothing was lost, or (last column) no loss is certain. They are estimates from the "
            "rows of this run, and rough if it has few rows."
        )
        yield _forgotten(results, L, t)
    seconds = [cell["likelihood"]["seconds"] for cell in results.cells_of(run.tasks).values() if "likelihood" in cell]
    if seconds:
        whole = sum(map(results.evaluation_seconds, run.stages))
        yield f"Reading the likelihoods took {count(sum(seconds))} of the {count(whole)} seconds of the evaluation."


def _nats(value: float) -> str:
    return DASH if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"  # no "-0.000"


def _forgotten(results: Results, L: Matrix, t: int) -> Table:
    changes, shares, i = soft_changes(results, t), share_of_gain(L, t), list(range(t - 1))
    base, own, last = L[0, i], L[1:].diagonal()[i], L[t, i]
    soft, hard = (
        [results.rows_since_own(task, t, metric) for task in results.run.tasks[: t - 1]]
        for metric in (LIKELIHOOD, None)
    )

    def row(name: str, scores: Iterable[float], change: Estimate, share: float, needed: list[str]) -> list[str]:
        return [name, *map(_nats, scores), NATS.with_interval(change, sign=True), _share(share), *needed]

    rows = []
    for k in i:
        needed = _needed([soft[k]], [hard[k]], changes[k], results.change(k, k + 1, t))
        rows.append(row(task_name(results.run.tasks[k]), (base[k], own[k], last[k]), changes[k], shares[k], needed))
    learned, bwt = float((own - base).mean()), metrics.mean_of(changes)
    share = bwt.value / learned if learned > 0 else math.nan
    needed = _needed(soft, hard, bwt, results.sequence["BWT"][t - 1])
    rows.append(row("mean", [float(values.mean()) for values in (base, own, last)], bwt, share, needed))
    head = ["task", "base", "own stage", f"stage {t}", "since then", "share"]
    return Table([*head, "rows needed<br>likelihood", "rows needed<br>score", "times fewer"], rows)


def _share(share: float) -> str:
    return DASH if math.isnan(share) else f"{round(100 * share) + 0.0:+.0f} %"


def _needed(soft: list[Matrix], hard: list[Matrix], *changes: Estimate) -> list[str]:
    """Rows needed by the likelihood and by the score, where they fell, and how many times fewer the first are."""
    found = [rows_needed(rows) if sum(x.mean() for x in rows) < 0 else None for rows in (soft, hard)]
    certain = any(change.sign < 0 for change in changes)  # else both numbers are of a loss that may be none
    fewer = f"{found[1] / found[0]:.1f}" if certain and found[0] and found[1] else DASH
    return [*(count(n) for n in found), fewer]
