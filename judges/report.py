"""The sections of a report about instruction following and safety, from the files of numbers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from judges import pairwise
from judges.calibrate import calibration_file
from judges.judging import KINDS, judge_file, sample_fingerprints, suites_of
from judges.pairwise import Kind
from judges.verdict import ends_in_words
from trace_bench.metrics import Estimate, wilson_interval
from trace_bench.run import Run, RunError, Stage, differences, read_json, read_jsonl
from trace_bench.tables import DASH, Block, Table, percent, percent_with_interval
from trace_bench.text import one_line
from trace_tasks.data.files import fingerprint

#: (stage index, suite) -> numbers.
Judged = dict[tuple[int, str], dict[str, Any]]


def load(run: Run, kind: Kind) -> Judged:
    """The judgements that are there and were made from the present samples.

    Raises:
        RunError: if a file lies where it does not belong, or its numbers are not those of its lines.
    """
    found = {}
    base = run.stages[0]
    for stage in run.stages:
        if not stage.is_trained:
            continue
        for suite in suites_of(stage, kind):
            file = judge_file(stage, suite)
            if not file.exists() or not base.samples_file(suite).exists():
                continue
            numbers = read_json(file)
            if numbers["samples"] == sample_fingerprints(base, stage, suite):
                _check(stage, suite, kind, numbers)
                found[stage.index, suite] = numbers
    return found


def _check(stage: Stage, suite: str, kind: Kind, numbers: dict[str, Any]) -> None:
    """Refuses numbers of another stage or suite, and those that do not add up to the verdicts beside them."""
    file = judge_file(stage, suite)
    verdict_file = file.with_suffix(".jsonl")
    redo = f"Delete {file} and judge again: the replies are in the cache."
    here = {"stage": stage.name, "suite": suite, "kind": kind.name}
    if wrong := {key: numbers[key] for key in here if numbers.get(key, here[key]) != here[key]}:
        raise RunError(f"{file} says {wrong}: it was moved or copied from elsewhere. {redo}")
    if verdict_file.exists() and numbers.get("lines") not in (None, fingerprint(verdict_file)):
        raise RunError(f"{verdict_file} was changed since it was written (its fingerprint differs). {redo}")
    try:
        lines = differences(*_sums(stage, suite, kind, numbers, redo))
    except (AttributeError, KeyError, TypeError) as e:
        raise RunError(f"{file} or the lines beside it are no judgement ({e!r}). {redo}") from e
    if lines:
        raise RunError(f"{file} does not add up (there -> of its verdicts):\n" + "\n".join(lines) + f"\n{redo}")


def _sums(stage: Stage, suite: str, kind: Kind, numbers: dict[str, Any], redo: str) -> tuple[dict, dict]:
    """The counts and rates of a file, and the same of the verdicts that they are of."""
    file = judge_file(stage, suite)
    verdict_file = file.with_suffix(".jsonl")
    there = {"direct": numbers["direct"], "pairs": numbers.get("pairs") or {}}
    if verdict_file.exists():
        rows = read_jsonl(verdict_file)
        ids = Counter(json.dumps(row["doc_id"]) for row in rows)
        if ids and ids.most_common(1)[0][1] > 1:
            raise RunError(f"{verdict_file} holds the row {ids.most_common(1)[0][0]} twice. {redo}")
        for row in rows if stage.index else ():
            if row["combined"] == "broken" and any(row.get("broken", ())):
                continue  # left out, and not judged
            if not row["identical"] and (row["combined"], row["disagree"]) != pairwise.combine(*row["verdicts"]):
                raise RunError(f"{verdict_file}: row {row['doc_id']} is not what its verdicts say. {redo}")
        counts = pairwise.tally(rows) if stage.index else None
        direct = pairwise.direct_rate(kind, (row["direct"] for row in rows))
    else:
        counts = {name: there["pairs"].get(name, 0) for name in pairwise.COUNTS} if there["pairs"] else None
        words = [w for w in kind.words for _ in range(there["direct"][w.lower()])]
        broken = [pairwise.BROKEN] * there["direct"].get("broken", 0)  # older results have no such count
        direct = pairwise.direct_rate(kind, [*words, *[None] * there["direct"]["unscored"], *broken])
        if counts and counts["n"] != sum(counts[name] for name in ("win", "tie", "lose", "unscored", "broken")):
            raise RunError(
                f"{file}: win, tie, lose, unscored and broken are not all of its {counts['n']} pairs. {redo}"
            )
    pairs = {**counts, **pairwise.rates(counts)} if counts else {}
    sums = {"direct": direct, "pairs": {k: v for k, v in pairs.items() if k in there["pairs"]}}
    sums["direct"] = {k: v for k, v in direct.items() if k in there["direct"]}
    return there, json.loads(json.dumps(sums))


def judge_tokens(judged: Iterable[Judged]) -> dict[int, int]:
    """Stage -> tokens of the judges' prompts and replies, of the stages that were judged."""
    found: dict[int, int] = {}
    for (index, _), numbers in (item for of_kind in judged for item in of_kind.items()):
        found[index] = found.get(index, 0) + numbers["prompt_tokens"] + numbers["completion_tokens"]
    return found


def verdicts(stage: Stage, suite: str) -> dict[Any, str]:
    """doc_id -> win, tie, lose or unscored, of a stage's pairs; none where the lines are not kept (see `load`)."""
    lines = judge_file(stage, suite).with_suffix(".jsonl")
    if not (judge_file(stage, suite).exists() and lines.exists()):
        return {}
    return {row["doc_id"]: row["combined"] for row in read_jsonl(lines) if "combined" in row}


def net_win_rate(judged: Judged, stage: Stage) -> Estimate:
    """The net win rate of a stage, pooled over its suites; NaN where no pair was scored, or a suite is missing."""
    counts = pooled(judged, stage)
    return _estimate(pairwise.rates(counts), "net") if counts else Estimate(math.nan)


def pooled(judged: Judged, stage: Stage) -> dict[str, int] | None:
    """The counts of a stage's pairs, its suites together; None where there are no pairs, or not all suites' ones.

    A rate over other suites, or over other rows of them, is another number, as it is of the general-ability delta.
    """
    mine = {suite: numbers for (index, suite), numbers in judged.items() if index == stage.index}
    pairs = [numbers["pairs"] for numbers in mine.values() if "pairs" in numbers]
    if not pairs or _lacking(judged, stage):
        return None
    return {name: sum(p.get(name, 0) for p in pairs) for name in pairwise.COUNTS}


def length_controlled(judged: Judged, stage: Stage) -> Estimate:
    """The net win rate of a stage at equal length, its suites together; NaN where that cannot be told."""
    if pooled(judged, stage) is None:
        return Estimate(math.nan)
    files = [judge_file(stage, suite).with_suffix(".jsonl") for index, suite in judged if index == stage.index]
    if not all(file.exists() for file in files):
        return Estimate(math.nan)
    return pairwise.length_controlled(row for file in files for row in read_jsonl(file) if "combined" in row)


def _lacking(judged: Judged, stage: Stage) -> list[str]:
    """The suites that other stages were judged on and this one was not."""
    return sorted({suite for _, suite in judged} - {suite for index, suite in judged if index == stage.index})


def sections(run: Run) -> Iterable[Block]:
    """The sections of a run's report; none where nothing was judged."""
    for kind in KINDS:
        found = load(run, kind)
        if found:
            yield from _section(run, kind, found)


def _section(run: Run, kind: Kind, found: Judged) -> Iterable[Block]:
    suites = sorted({suite for _, suite in found})
    about, *notes = map(one_line, _notes(run, kind, found, suites))
    yield f"## {kind.title}\n\n{about}\n\n" + "\n".join(notes)
    forced = sum(n["forced"] for n in found.values())
    if forced:
        share = _rate(forced / sum(n["requests"] for n in found.values()))
        yield (
            f"> **{share} % of the verdicts were forced**: the judge gave none by itself and had to choose one. "
            "Results of this version count them as unscored, in no rate."
        )
    rows = []
    for stage in run.stages:
        mine = [numbers for (index, _), numbers in found.items() if index == stage.index]
        if mine:
            whole = not _lacking(found, stage)
            direct = _direct_cells(kind, mine) if whole else [DASH] * 3
            pairs = _pair_cells(pooled(found, stage), length_controlled(found, stage))
            rows.append([stage.name, *pairs, *direct])
    header = ["stage", "pairs", "win", "tie", "lose", "net win rate", "at equal length"]
    header += ["orders disagree", "first position", "unscored", "broken"]
    yield Table([*header, kind.rate, "unscored", "broken"], rows)
    if len(suites) > 1:
        yield f"Net win rate / {kind.rate} by suite:"
        yield Table(
            ["stage", *(s.removeprefix(kind.prefix) for s in suites)],
            [
                [stage.name, *(_suite_cell(found.get((stage.index, suite))) for suite in suites)]
                for stage in run.stages
                if any(index == stage.index for index, _ in found)
            ],
        )


def _estimate(rates: dict[str, Any], name: str) -> Estimate:
    value, interval = rates["net_win_rate" if name == "net" else f"{name}_rate"], rates[f"{name}_interval"]
    return Estimate(math.nan) if value is None else Estimate(value, *interval)


def _pair_cells(counts: dict[str, int] | None, controlled: Estimate) -> list[str]:
    """The cells of pairwise judgement, pooled over the suites of a stage."""
    if counts is None:
        return [DASH] * 10
    rates = pairwise.rates(counts)
    return [
        str(counts["n"]),
        *(percent_with_interval(_estimate(rates, name)) for name in ("win", "tie", "lose")),
        percent_with_interval(_estimate(rates, "net"), sign=True),
        percent_with_interval(controlled, sign=True),
        _rate(rates["disagreement_rate"]),
        _rate(rates["first_position_rate"]),
        str(counts["unscored"]),
        str(counts["broken"]),
    ]


def _direct_cells(kind: Kind, mine: list[dict[str, Any]]) -> list[str]:
    counts = [numbers["direct"] for numbers in mine]
    count = sum(c[kind.counted.lower()] for c in counts)
    broken = sum(c.get("broken", 0) for c in counts)
    scored = sum(c["n"] - c["unscored"] for c in counts) - broken
    rate = Estimate(count / scored, *wilson_interval(count, scored)) if scored else Estimate(math.nan)
    return [percent_with_interval(rate), str(sum(c["unscored"] for c in counts)), str(broken)]


def _suite_cell(numbers: dict[str, Any] | None) -> str:
    if numbers is None:
        return DASH
    net = numbers.get("pairs", {}).get("net_win_rate")
    return f"{DASH if net is None else percent(net, sign=True)} / {_rate(numbers['direct']['rate'])}"


def _notes(run: Run, kind: Kind, found: Judged, suites: list[str]) -> Iterable[str]:
    yield (
        "Each answer of a stage against the base model's, judged in both orders, in percent of the scored pairs with "
        "95 % intervals. Net win rate = win - lose, the delta. Orders that disagree are a tie; first position = its "
        "share of the verdicts for a position, 50 without bias. Identical answers are a tie. "
        "At equal length = the net win rate of a logistic model of the win at no difference of length, since judges "
        f"like long answers (tanh of characters, no term for the prompt; from {pairwise.FEWEST_PAIRS} pairs on). "
        f"The rate of {kind.rate} is judged answer by answer. Broken = answers that say nothing (empty, no letters, "
        "one piece repeated, mojibake), by rule: they count in no rate of single answers"
        + (", and pairs with one are left out." if kind.leaves_out_broken else ".")
    )
    yield f"- suites: {', '.join(suites)}"
    judges = list({json.dumps(n["settings"], sort_keys=True): n["settings"] for n in found.values()}.values())
    for judge in judges:
        how = f"`{json.dumps(judge['sampling'])}`, prompts version {judge['prompts']}"
        yield f"- judge: `{judge['judge']}`, {how}; {_calibration(run, kind, judge)}"
        its = [n for n in found.values() if n["settings"] == judge]
        # Older results do not have these counts.
        counts = {name: sum(n.get(name, 0) for n in its) for name in ("cut", "unclosed")}
        for sentence in ends_in_words(counts, sum(n["requests"] for n in its), judge["sampling"]):
            yield f"- {sentence}"
    if len(judges) > 1:
        yield "- **Several judges**: what was judged by different ones cannot be compared"
    for stage in run.stages:
        lacking = _lacking(found, stage) if any(index == stage.index for index, _ in found) else []
        if lacking:
            yield f"- {stage.name} was not judged on {', '.join(lacking)}, so its suites have no common rate"
    limits = {n["limit"] for n in found.values() if n["limit"]}
    if len({n["limit"] for n in found.values()}) > 1:
        yield "- **Other rows at other stages**: some were judged on the first rows alone"
    if limits:
        yield f"- **Limited rows**: first {' or '.join(map(str, sorted(limits)))} of each suite"
    failed = sum(n["failed"] for n in found.values())
    if failed:
        yield f"- {failed} requests failed and count as unscored: the same `trace-bench judge` asks them again"
    unpaired = sum(n["unpaired"] for n in found.values())
    if unpaired:
        yield f"- {unpaired} rows had no partner at the base model and were left out"


def _calibration(run: Run, kind: Kind, judge: dict[str, Any]) -> str:
    """How often the judge was right where that is known, if it was calibrated with the same settings."""
    # Beside the run, or above it where a study keeps its runs together.
    files = [calibration_file(folder, judge["judge"]) for folder in run.path.absolute().parents[:2]]
    found = [calibration for file in files if file.exists() and (calibration := read_json(file))["settings"] == judge]
    if not found:
        return f"not calibrated: `trace-bench judge {run.path} --calibrate --model {judge['judge']}`"
    return "right on planted answers, percent: " + ", ".join(
        f"{name.removeprefix(kind.name).strip()} {_rate(numbers['accuracy'])}"
        for name, numbers in found[0]["kinds"].items()
        if name.startswith(kind.name)
    )


def _rate(value: float | None) -> str:
    return DASH if value is None else percent(value)
