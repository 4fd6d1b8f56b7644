"""The sections about instruction following and safety."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from trace_bench import judgements
from trace_bench.judgements import Judged, Kind, lacking, pooled, rate_of
from trace_bench.metrics import Estimate, wilson_interval
from trace_bench.report.results import Results, measured
from trace_bench.report.tables import DASH, Block, Table, percent, percent_with_interval
from trace_bench.run import Run, read_json
from trace_bench.text import one_line, word

_ABOUT = (
    "The judge compares each answer of a stage with that of the base model, in both orders. Rates are in percent of "
    "the scored pairs, with 95 % intervals. Net win rate = win - lose (the delta). If the two orders disagree, or the "
    "answers are identical, the pair is a tie. First position = its share of the verdicts for a position, in pairs "
    "with both verdicts; 50 without bias. At equal length = the net win rate that a logistic model gives for answers "
    "of equal length, since judges prefer long answers (tanh of characters, no term for the prompt; needs {fewest} "
    "pairs). The rate of {kind.rate} is from judging each answer alone. Broken = answers without content (empty, no "
    "letters, one piece repeated, mojibake), found by rule: they are in no rate of single answers{left_out}."
)


def sections(results: Results) -> Iterable[Block]:
    """A section for each kind of judgement that there is."""
    for kind in judgements.KINDS:
        if found := results.judged[kind.name]:
            yield from _section(results.run, kind, found)


def _section(run: Run, kind: Kind, found: Judged) -> Iterable[Block]:
    suites = sorted({suite for _, suite in found})
    left_out = ", and pairs with a broken answer are left out" if kind.leaves_out_broken else ""
    about = _ABOUT.format(kind=kind, fewest=judgements.FEWEST_PAIRS, left_out=left_out)
    yield f"## {kind.title}\n\n{about}\n\n" + "\n".join(map(one_line, _notes(run, kind, found, suites)))
    forced = sum(n["forced"] for n in found.values())
    if forced:
        share = percent(forced / sum(n["requests"] for n in found.values()))
        yield (
            f"> **{share} % of the verdicts were forced**: the judge gave no verdict and had to choose one. "
            "This version counts them as unscored, so they are in no rate."
        )
    stages = measured(run, found)
    rows = []
    for stage in stages:
        of_stage = [numbers for (index, _), numbers in found.items() if index == stage.index]
        single = [DASH] * 3 if lacking(found, stage) else _single_cells(kind, of_stage)
        controlled = judgements.net_win_rate_at_equal_length(found, stage)
        rows.append([stage.name, *_pair_cells(pooled(found, stage), controlled), *single])
    header = ["stage", "pairs", "win", "tie", "lose", "net win rate", "at equal length"]
    header += ["orders disagree", "first position", "unscored", "broken"]
    yield Table([*header, kind.rate, "unscored", "broken"], rows)
    if len(suites) > 1:
        yield f"Net win rate / {kind.rate} by suite:"
        rows = [[stage.name, *(_suite_cell(found.get((stage.index, suite))) for suite in suites)] for stage in stages]
        yield Table(["stage", *(suite.removeprefix(kind.prefix) for suite in suites)], rows)


def _pair_cells(counts: dict[str, int] | None, controlled: Estimate) -> list[str]:
    if counts is None:
        return [DASH] * 10
    rates = judgements.rates(counts)
    return [
        str(counts["n"]),
        *(percent_with_interval(rate_of(counts, name)) for name in ("win", "tie", "lose")),
        percent_with_interval(rate_of(counts, "net"), sign=True),
        percent_with_interval(controlled, sign=True),
        *(percent(rates[name]) for name in ("disagreement_rate", "first_position_rate")),
        str(counts["unscored"]),
        str(counts["broken"]),
    ]


def _single_cells(kind: Kind, of_stage: list[dict[str, Any]]) -> list[str]:
    counts = [numbers["direct"] for numbers in of_stage]
    counted, unscored, broken = (sum(c.get(k, 0) for c in counts) for k in (kind.counted.lower(), "unscored", "broken"))
    scored = sum(c["n"] for c in counts) - unscored - broken
    rate = Estimate(counted / scored, *wilson_interval(counted, scored)) if scored else Estimate(math.nan)
    return [percent_with_interval(rate), str(unscored), str(broken)]


def _suite_cell(numbers: dict[str, Any] | None) -> str:
    if numbers is None:
        return DASH
    net = numbers.get("pairs", {}).get("net_win_rate")
    return f"{percent(net, sign=True)} / {percent(numbers['direct']['rate'])}"


def _notes(run: Run, kind: Kind, found: Judged, suites: list[str]) -> Iterable[str]:
    yield f"- suites: {', '.join(suites)}"
    judges = list({json.dumps(n["settings"], sort_keys=True): n["settings"] for n in found.values()}.values())
    for judge in judges:
        how = f"`{json.dumps(judge['sampling'])}`, prompts version {judge['prompts']}"
        its = [n for n in found.values() if n["settings"] == judge]
        models = sorted({model for n in its for model in n.get("models", ())})
        yield f"- judge: `{judge['judge']}`, {how}; {_calibration(run, kind, judge, models)}"
        if len(models) > 1:
            at = {
                m: sorted({i for (i, _), n in found.items() if n in its and m in n.get("models", ())}) for m in models
            }
            listed = "; ".join(f"{m} (stage {', '.join(map(str, stages))})" for m, stages in at.items())
            yield f"- **Several models answered** as `{judge['judge']}`: {listed}. So this is not one judge"
        elif models not in ([], [judge["judge"]]):
            yield f"- the endpoint says that `{models[0]}` answered"
        counts = {name: sum(n.get(name, 0) for n in its) for name in ("cut", "unclosed")}  # older results lack them
        for sentence in judgements.ends_in_words(counts, sum(n["requests"] for n in its), judge["sampling"]):
            yield f"- {sentence}"
    if len(judges) > 1:
        yield "- **Several judges**: verdicts of different judges cannot be compared"
    for stage in measured(run, found):
        if missing := lacking(found, stage):
            yield f"- {stage.name} was not judged on {', '.join(missing)}, so its suites have no common rate"
    limits = {n["limit"] for n in found.values()}
    if len(limits) > 1:
        yield "- **Different rows at different stages**: some stages were judged only on their first rows"
    if any(limits):
        yield f"- **Limited rows**: first {' or '.join(map(str, sorted(filter(None, limits))))} of each suite"
    failed, unpaired = (sum(n[key] for n in found.values()) for key in ("failed", "unpaired"))
    if failed:
        yield f"- {failed} requests failed and count as unscored: run the same `trace-bench judge` again to repeat them"
    if unpaired:
        yield f"- {unpaired} rows had no partner at the base model and were left out"


def _calibration(run: Run, kind: Kind, judge: dict[str, Any], models: list[str]) -> str:
    """How often the judge was right where that is known, if it was calibrated with these settings and as `models`."""
    # Next to the run, or above it where a study keeps its runs together.
    files = [judgements.calibration_file(folder, judge["judge"]) for folder in run.path.absolute().parents[:2]]
    found = [calibration for file in files if file.exists() and (calibration := read_json(file))["settings"] == judge]
    # Older results name no models.
    found = [c for c in found if not models or not c.get("models") or {*models} <= {*c["models"]}]
    if not found:
        return f"not calibrated: `trace-bench judge {word(run.path)} --calibrate --model {word(judge['judge'])}`"
    return "right on planted answers, percent: " + ", ".join(
        f"{name.removeprefix(kind.name).strip()} {percent(numbers['accuracy'])}"
        for name, numbers in found[0]["kinds"].items()
        if name.startswith(kind.name)
    )
