"""Judges the samples of a run: every stage against the base model in both orders, and every answer by itself.

Samples come from evaluation (`stage.samples_file`), results go to the stage's folder: judge/<suite>.jsonl, one line a
pair with both replies, and then judge/<suite>.json, the numbers. A suite is done when the second file exists, was made
from these samples, and no request of it failed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from judges import instruction, pairwise, prompts, safety
from judges.broken import why_broken
from judges.pairwise import Kind
from judges.verdict import ends, ends_in_words, forced_verdict, verdict_of, why_unscored
from trace_bench.records import check_one_checkpoint, check_samples, check_stages
from trace_bench.run import WRITTEN, Run, RunError, Stage, differences, read_json
from trace_tasks.data.files import fingerprint, refuse_links, write_json, write_jsonl
from trace_tasks.data.reading import MOST_LINES, read_file

if TYPE_CHECKING:
    from judges.client import Judge, Reply, Request

log = logging.getLogger(__name__)

KINDS = (instruction.KIND, safety.KIND)


@dataclass(frozen=True)
class Pair:
    """An answer of a stage, with that of the base model; stage 0 has none to be compared with."""

    doc_id: Any
    prompt: str
    response: str
    base: str | None

    @property
    def identical(self) -> bool:
        """Whether there is nothing to choose between: a tie without asking."""
        return self.base is not None and self.base.strip() == self.response.strip()

    @cached_property
    def broken(self) -> list[str | None]:
        """Why the answer, and the base model's, say nothing; see `broken.why_broken`."""
        return [why_broken(text) for text in (self.response, self.base) if text is not None]

    def is_left_out(self, kind: Kind) -> bool:
        """Whether the pair is not judged, since one of its answers says nothing."""
        return self.base is not None and kind.leaves_out_broken and any(self.broken)

    def requests(self, kind: Kind) -> list[Request]:
        """What is asked: about the answer alone, then about the pair in both orders. Nothing of what is broken."""
        messages = [] if self.broken[0] else [kind.direct(self.prompt, self.response)]
        if self.base is not None and not self.identical and not self.is_left_out(kind):
            messages.append(kind.pair(self.prompt, self.response, self.base))
            messages.append(kind.pair(self.prompt, self.base, self.response))
        return [{"messages": m} for m in messages]


@dataclass(frozen=True)
class Job:
    """One suite at one stage."""

    stage: Stage
    suite: str
    kind: Kind
    samples: dict[str, str | None]
    pairs: list[Pair]
    unpaired: int

    @property
    def requests(self) -> list[Request]:
        """All that is asked, pair after pair."""
        return [request for pair in self.pairs for request in pair.requests(self.kind)]


def judge_file(stage: Stage, suite: str) -> Path:
    """The numbers of one suite at one stage; the replies are beside it, as .jsonl."""
    return stage.path / "judge" / f"{suite}.json"


def cache_file(folder: Path) -> Path:
    """The replies of a folder of runs: they share it, since the base model's answers are the same in many."""
    return folder / "judge-cache.jsonl"


def settings(judge: Judge) -> dict[str, Any]:
    """What a verdict depends on besides the texts. Results with other settings are not mixed."""
    return {
        "judge": judge.model,
        "revision": judge.revision,
        "sampling": judge.sampling,  # with the arguments of the chat template
        "date": judge.date,
        "prompts": prompts.VERSION,
    }


def suites_of(stage: Stage, kind: Kind) -> list[str]:
    """The suites of a kind that a stage has samples of, whoever chose them."""
    return sorted(p.stem for p in stage.samples_file("x").parent.glob(f"{kind.prefix}*.jsonl"))


def sample_fingerprints(base: Stage, stage: Stage, suite: str) -> dict[str, str | None]:
    """What identifies the samples that a judgement was made from."""
    return {
        "stage": fingerprint(stage.samples_file(suite)),
        "base": None if stage.index == 0 else fingerprint(base.samples_file(suite)),
    }


def plan(
    run: Run,
    judge: Judge,
    *,
    stages: Iterable[int] | None = None,
    suites: Iterable[str] | None = None,
    limit: int | None = None,
) -> list[Job]:
    """What is to be judged, without asking anything.

    Args:
        run: The run.
        judge: Who will judge.
        stages: Indices of stages; None = all. Each is compared with stage 0, whether that is among them or not.
        suites: Names of suites; None = all that there are samples of.
        limit: First so many rows of each suite.

    Returns:
        The jobs that are not done.

    Raises:
        RunError: if a stage or suite does not exist, the samples of two stages do not belong together, or there are
            results of another judge.
    """
    refuse_links(run.path, *WRITTEN)
    base = run.stages[0]
    wanted = run.indices(stages)
    check_stages(run, [stage for stage in run.stages if stage.index in wanted])
    present = {(s.index, suite): kind for s in run.stages for kind in KINDS for suite in suites_of(s, kind)}
    names = sorted({suite for index, suite in present if index in wanted})
    chosen = names if suites is None else sorted(set(suites))
    missing = set(chosen) - set(names)
    if missing or not names:
        raise RunError(
            f"{run.path} has no samples of {', '.join(sorted(missing)) or 'instruct_* or safety_* tasks'} at the "
            f"stages asked for; there are: {', '.join(names) or 'none'}. `trace-bench evaluate` writes them."
        )
    for kind in KINDS:
        if any(suite.startswith(kind.prefix) for suite in chosen):
            _check_one_judge(run, kind, judge, limit, {(i, suite) for i in wanted for suite in chosen})
    jobs = []
    for stage in run.stages:
        if stage.index not in wanted:
            continue
        if not stage.is_trained:
            log.warning("Stage %s is not trained and left out: its samples are of weights that are gone.", stage.name)
            continue
        for suite in chosen:
            if (stage.index, suite) not in present or not _is_current(stage, suite):
                continue
            if (0, suite) not in present:
                raise RunError(f"Stage 0 has no samples of {suite} to compare {stage.name} with: evaluate stage 0.")
            job = _job(base, stage, suite, present[stage.index, suite], limit)
            if not _is_done(job, limit):
                jobs.append(job)
    return jobs


def judge_jobs(jobs: Sequence[Job], judge: Judge, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Asks what is not in the cache and writes the results of each job.

    Args:
        jobs: What `plan` returned.
        judge: Who judges.
        limit: As given to `plan`, for the record.

    Returns:
        The contents of the files of numbers.

    Raises:
        JudgeError: if the judge cannot be asked. Its replies so far are kept.
    """
    # All at once: one progress bar, one batch; and since the replies are kept, nothing is lost by writing at the end.
    replies = iter(judge.complete([request for job in jobs for request in job.requests]))
    results = []
    for job in jobs:
        mine = [[next(replies) for _ in pair.requests(job.kind)] for pair in job.pairs]
        rows = [_row(pair, answers, job.kind) for pair, answers in zip(job.pairs, mine, strict=True)]
        flat = [reply for answers in mine for reply in answers]
        result = {
            "suite": job.suite,
            "kind": job.kind.name,
            "stage": job.stage.name,
            "settings": settings(judge),
            "endpoint": judge.endpoint,
            "limit": limit,
            "samples": job.samples,
            "unpaired": job.unpaired,
            "direct": pairwise.direct_rate(job.kind, (row["direct"] for row in rows)),
            "failed": sum(reply.error is not None for reply in flat),
            "forced": sum(reply.forced for reply in flat),
            **ends(flat),
            # Of all replies, whether they were paid now or came from the cache.
            "requests": len(flat),
            "prompt_tokens": sum(reply.prompt_tokens for reply in flat),
            "completion_tokens": sum(reply.completion_tokens for reply in flat),
        }
        if job.stage.index:
            counts = pairwise.tally(rows)
            result["pairs"] = {**counts, **pairwise.rates(counts)}
        file = judge_file(job.stage, job.suite)
        file.unlink(missing_ok=True)  # between the two files there are no numbers rather than those of other rows
        write_jsonl(file.with_suffix(".jsonl"), rows)
        result["lines"] = fingerprint(file.with_suffix(".jsonl"))
        write_json(file, result)
        results.append(result)
    return results


def summary(results: Sequence[dict[str, Any]], sampling: dict[str, Any]) -> str:
    """One line about what was judged, for people: how much is unscored, and which option helps."""
    unscored = sum(r["direct"]["unscored"] + r.get("pairs", {}).get("unscored", 0) for r in results)
    counts = {name: sum(r[name] for r in results) for name in ("cut", "unclosed")}
    notes = ends_in_words(counts, sum(r["requests"] for r in results), sampling)
    if counts["cut"]:
        notes.append("another limit is another judge: delete stages/*/judge of the run first")
    return f"judged {len(results)} suites ({'; '.join([f'{unscored} judgements unscored', *notes])})"


def _job(base: Stage, stage: Stage, suite: str, kind: Kind, limit: int | None) -> Job:
    mine = _read_samples(stage, suite)
    if stage.index == 0:
        pairs, unpaired = [Pair(i, _asked(row), row["response"], None) for i, row in mine.items()], 0
    else:
        theirs = _read_samples(base, suite)
        pairs = [
            Pair(i, _asked(row), row["response"], theirs[i]["response"])
            for i, row in mine.items()
            if i in theirs and theirs[i]["prompt"] == row["prompt"]
        ]
        unpaired = len(mine.keys() | theirs.keys()) - len(pairs)
        if not pairs:
            raise RunError(
                f"{stage.samples_file(suite)} and {base.samples_file(suite)} have no prompt in common: they were made "
                "from other data or settings. Evaluate both anew."
            )
        if unpaired:
            log.warning("%s, %s: %d rows have no partner and are left out.", stage.name, suite, unpaired)
    return Job(stage, suite, kind, sample_fingerprints(base, stage, suite), pairs[:limit], unpaired)


def _row(pair: Pair, answers: list[Reply], kind: Kind) -> dict[str, Any]:
    """A line of the results: verdicts, and the replies they were read from."""

    def text(reply: Reply) -> str | None:
        return None if reply.error else reply.text

    direct, both = (None, answers) if pair.broken[0] else (answers[0], answers[1:])
    row: dict[str, Any] = {
        "doc_id": pair.doc_id,
        "direct": verdict_of(direct, kind.words) if direct else pairwise.BROKEN,
        "direct_reply": text(direct) if direct else None,
    }
    reasons = [direct and why_unscored(direct, kind.words), *(why_unscored(reply, prompts.PAIR) for reply in both)]
    forced = [direct and forced_verdict(direct, kind.words), *(forced_verdict(reply, prompts.PAIR) for reply in both)]
    if any(pair.broken):
        row["broken"] = pair.broken  # of the stage's answer, then of the base model's
    if pair.base is not None:
        verdicts = [verdict_of(reply, prompts.PAIR) for reply in both]
        if pair.is_left_out(kind):
            combined, disagree = "broken", False
        else:
            combined, disagree = ("tie", False) if pair.identical else pairwise.combine(*verdicts)
        row |= {
            "combined": combined,
            "disagree": disagree,
            "identical": pair.identical,
            "lengths": [len(pair.response), len(pair.base)],  # in characters
            "verdicts": verdicts,  # of the order (stage, base) and of (base, stage)
            "replies": [text(reply) for reply in both],
        }
    if any(reasons):
        row["unscored"] = reasons  # of the direct reply, then of both orders
    if any(forced):
        row["forced"] = forced  # the same; no rate counts them
    errors = [reply.error for reply in answers if reply.error]
    return {**row, "errors": errors} if errors else row


def _asked(row: dict[str, Any]) -> str:
    """What the user asked: the instruction, where a sample has it beside the prompt that a chat template made of it."""
    return row.get("instruction", row["prompt"])


def _read_samples(stage: Stage, suite: str) -> dict[Any, dict[str, Any]]:
    file, rows = stage.samples_file(suite), {}
    for number, line in enumerate(read_file(file, MOST_LINES).split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            for text in (row["prompt"], row["response"], _asked(row)):
                if not isinstance(text, str):
                    raise ValueError("prompt and response must be texts")
                text.encode("utf-8")  # half a character, which no request can hold, is an error here
            if row["doc_id"] in rows:
                raise ValueError(f"doc_id {row['doc_id']!r} was there before")
            rows[row["doc_id"]] = row
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise RunError(
                f"{file}, line {number} is no sample ({e}). Delete it and its score, {stage.eval_file(suite)}, and "
                "evaluate again."
            ) from e
    check_samples(stage, suite, list(rows))
    return rows


def _is_current(stage: Stage, suite: str) -> bool:
    """Whether the samples are those of the weights that the stage has now."""
    check_one_checkpoint(stage)
    cell, trained = stage.eval_file(suite), stage.train_file
    if cell.exists() and trained.exists() and read_json(cell)["checkpoint"] != read_json(trained)["checkpoint"]:
        log.warning("%s, %s: the samples are of an older checkpoint. Evaluate the stage first.", stage.name, suite)
        return False
    return True


def _check_one_judge(
    run: Run, kind: Kind, judge: Judge, limit: int | None, chosen: Collection[tuple[int, str]]
) -> None:
    """Refuses to judge some stages or suites of a run by another judge, or on other rows, than the others have.

    Args:
        run: The run.
        kind: What is judged; each kind is a table of its own.
        judge: Who judges now.
        limit: The first so many rows.
        chosen: (stage index, suite) of what is judged now, and so made anew where the rows are others.
    """
    now = json.loads(json.dumps({**settings(judge), "endpoint": judge.endpoint}))
    for stage in run.stages:
        for suite in suites_of(stage, kind):
            file = judge_file(stage, suite)
            if not file.exists():
                continue
            there = read_json(file)
            made = {**there["settings"], "endpoint": there.get("endpoint", judge.endpoint)}
            lines = differences(made, now)
            if lines:
                raise RunError(
                    f"{file} was made by another judge (there -> asked for):\n"
                    + "\n".join(lines)
                    + f"\nOne table needs one judge. Use the old one, or delete {run.path}/stages/*/judge; its replies "
                    "stay in the cache."
                )
            if there["limit"] != limit and (stage.index, suite) not in chosen:
                raise RunError(
                    f"{file} was made with --limit {there['limit']}, asked for is {limit}: rates over other rows are "
                    "other numbers. Use the old limit, or judge all stages and suites at once."
                )


def _is_done(job: Job, limit: int | None) -> bool:
    file = judge_file(job.stage, job.suite)
    if not file.exists():
        return False
    there = read_json(file)
    if there["samples"] != job.samples:
        log.warning("%s was made from older samples and is made anew.", file)
        return False
    return there["limit"] == limit and not there["failed"]
