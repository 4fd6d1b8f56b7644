"""The section that shows one matrix as other papers and their code would print it, and what they printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from trace_bench import metrics
from trace_bench.measures import conventions
from trace_bench.metrics import Estimate, Matrix
from trace_bench.report import paper
from trace_bench.report.results import Results
from trace_bench.report.tables import PERCENT, Block, Table


class Convention(NamedTuple):
    """A way to make one number of the matrix."""

    name: str
    meaning: str
    equation: str
    printed_by: str
    of: Callable[[Matrix, int], float]
    """From the matrix of gains, and the stage."""
    scale: Callable[[int], float] = lambda t: 1.0
    """Times the mean over the t-1 older tasks of what `of_rows` gives it is the number."""
    of_rows: Callable[[Matrix, int, int], Matrix] | None = None
    """From the gains of a task's rows (rows, stages), its own stage and the last; None: no interval."""


def _since_own(x: Matrix, own: int, t: int) -> Matrix:
    return x[:, t] - x[:, own]


#: No interval where a maximum or minimum is biased: see `metrics.forgetting`.
CONVENTIONS = (
    Convention(
        "BWT",
        "mean change of a task since its own stage",
        "`1/(T-1) Σ_{i=1..T-1} (R[T,i] - R[i,i])`",
        "TRACE's tables (table 3 without the sign); GEM, equation 3; SEEKR's paper; mammoth's code; this report",
        metrics.backward_transfer,
        of_rows=_since_own,
    ),
    Convention(
        "BWT, 1/T",
        "counts the last task as unchanged, so it is nearer to 0",
        "`1/T Σ_{i=1..T} (R[T,i] - R[i,i])`",
        "TRACE's formula (section 3.3); the code of GEM and of SEEKR",
        conventions.backward_transfer_of_all,
        lambda t: (t - 1) / t,
        _since_own,
    ),
    Convention(
        "BWT, clipped",
        "only losses count; a gain of one task does not offset a loss",
        "`1/T Σ_{i=1..T} min(R[T,i] - R[i,i], 0)`",
        "TreeLoRA's code; its paper prints it without the sign",
        conventions.clipped_backward_transfer,
    ),
    Convention(
        "BWT, all stages",
        "mean over all later stages, so a loss counts even if it came back",
        "`2/(T(T-1)) Σ_{l=2..T} Σ_{i=1..l-1} (R[l,i] - R[i,i])`",
        "Díaz-Rodríguez et al. 2018",
        conventions.mean_backward_transfer,
        of_rows=lambda x, own, t: (x[:, own + 1 : t + 1] - x[:, [own]]).sum(axis=1) * 2 / t,
    ),
    Convention(
        "Forgetting",
        "mean drop of a task from its best stage before the last",
        "`1/(T-1) Σ_{i=1..T-1} (max_{l=i..T-1} R[l,i] - R[T,i])`",
        "this report; Chaudhry et al. 2018 and A-GEM's code, where the best stage may also be before the task's own",
        metrics.forgetting,
    ),
    Convention(
        "Forgetting, clipped",
        "the last stage can be the best one, so no task is below 0",
        "`1/(T-1) Σ_{i=1..T-1} (max_{l=i..T} R[l,i] - R[T,i])`",
        "mammoth's code",
        conventions.clipped_forgetting,
    ),
)
ABOUT = (
    "## As other papers would print this run\n\nThe same matrix at stage {t}, with each rule for forgetting that "
    "papers and their code use. Compare with a paper only in the row of its rule. BWT below 0 and Forgetting above 0 "
    "mean forgetting. GEM calls OP ACC; O-LoRA calls it average accuracy."
)


def sections(results: Results) -> Iterable[Block]:
    """The conventions, and published results next to the run's; empty if nothing can be forgotten yet."""
    t = results.last_stage
    if t < 2 or results.unit is None:
        return
    unit, R = results.unit, results.matrix("accuracy_tolerant")
    about, head, columns = ABOUT.format(t=t), [unit.plain], [results.headlines]
    tolerant = {
        task: "accuracy_tolerant"
        for i, task in enumerate(results.run.tasks[:t])
        if results.headlines[task] == "accuracy" and not np.isnan(R[i + 1 : t + 1, i]).any()
    }
    if tolerant:
        columns.append(results.headlines | tolerant)
        head = ["strict", "form-tolerant"]
        about += " Form-tolerant: right answers in a different form count, in the tasks that have such an accuracy."
    yield about
    rows = []
    for convention in CONVENTIONS:
        estimates = [estimate(results, convention, t, metrics_of) for metrics_of in columns]
        signed = convention.name.startswith("BWT")
        texts = [unit.with_interval(e, sign=signed) for e in estimates]
        rows.append([convention.name, *texts, convention.meaning, convention.equation, convention.printed_by])
    yield Table(["number", *head, "meaning", "equation", "printed by"], rows)
    if unit.is_percent:
        yield from paper.published(results)


def estimate(results: Results, convention: Convention, t: int, metrics_of: Mapping[str, str]) -> Estimate:
    """A convention's number at a stage, with its interval over test rows where it is a mean.

    The tasks share a unit; `metrics_of` names the metric to take of each.
    """
    unit, tasks = results.unit or PERCENT, results.run.tasks
    gains, found = results.gains.copy(), []
    for i, task in enumerate(tasks):
        if (metric := metrics_of.get(task)) != results.headlines.get(task):
            gains[:, i] = results.matrix(metric)[:, i]
    value = convention.of(gains, t)
    if convention.of_rows is None:
        return Estimate(value)
    interval = partial(metrics.difference_interval, fractions=unit.scale == 1)
    for i, task in enumerate(tasks[: t - 1]):
        if task not in results.rows or metrics_of[task] not in results.rows[task].scores:
            return Estimate(value)
        x = unit.sign * results.rows[task].scores[metrics_of[task]]
        found += results.rows[task].estimates(convention.of_rows(x, i + 1, t)[:, None], interval)
    mean = metrics.mean_of(found)
    return Estimate(value, *(convention.scale(t) * bound for bound in mean[1:]))
