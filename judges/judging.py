"""Judges the samples of a run: every stage against the base model in both orders, and every answer by itself.

Results go to the stage's folder: judge/<suite>.jsonl, one line a pair with both replies, and then judge/<suite>.json,
the numbers. A suite is done when the second file exists, was made from these samples, and no request of it failed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from judges import prompts
from judges.broken import why_broken
from judges.judge import Judge
from judges.replies import Reply, Request, models_of
from judges.verdict import ends, verdict_of, why_unscored
from trace_bench import judgements
from trace_bench.judgements import BROKEN, KINDS, Kind, judge_file, sample_fingerprints, suites_of
from trace_bench.manifest import differences
from trace_bench.records import check_one_checkpoint, check_samples, check_stages
from trace_bench.run import WRITTEN, Run, RunError, Stage, read_json, read_jsonl
from trace_bench.text import word
from trace_tasks.data.files import fingerprint, refuse_links, write_json, write_jsonl
from trace_tasks.errors import suggestion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """An answer of a stage with the base model's answer to the same prompt; stage 0 has only its own."""

    doc_id: Any
    prompt: str
    response: str
    base: str | None

    @property
    def identical(self) -> bool:
        """Whether both answers are the same, which is a tie without asking."""
        return self.base is not None and self.base.strip() == self.response.strip()

    @cached_property
    def broken(self) -> list[str | None]:
        """Why the answer, and the base model's, say nothing; see `broken.why_broken`."""
        return [why_broken(text) for text in (self.response, self.base) if text is not None]

    def is_left_out(self, kind: Kind) -> bool:
        """Whether the pair is not judged, since one of its answers says nothing."""
        return self.base is not None and kind.leaves_out_broken and any(self.broken)

    def requests(self, kind: Kind) -> list[Request]:
        """The requests: about the answer alone, then about the pair in both orders. None about broken answers."""
        messages = [] if self.broken[0] else [prompts.direct(kind, self.prompt, self.response)]
        if self.base is not None and not self.identical and not self.is_left_out(kind):
            messages.append(prompts.pair(kind, self.prompt, self.response, self.base))
            messages.append(prompts.pair(kind, self.prompt, self.base, self.response))
        return [{"messages": m} for m in messages]

    def line(self, kind: Kind, replies: Sequence[Reply]) -> dict[str, Any]:
        """A line of the results: verdicts, and the replies to `requests` that they were read from."""

        def shown(reply: Reply) -> str | None:
            return None if reply.error else reply.text

        direct, both = (None, replies) if self.broken[0] else (replies[0], replies[1:])
        judged = [(direct, kind.words), *((reply, prompts.PAIR) for reply in both)]
        line: dict[str, Any] = {
            "doc_id": self.doc_id,
            "direct": verdict_of(direct, kind.words) if direct else BROKEN,
            "direct_reply": shown(direct) if direct else None,
        }
        if any(self.broken):
            line["broken"] = self.broken  # of the stage's answer, then of the base model's
        if self.base is not None:
            verdicts = [verdict_of(reply, prompts.PAIR) for reply in both]
            combined, disagree = judgements.combine(*verdicts) if both else ("tie", False)
            line |= {
                "combined": "broken" if self.is_left_out(kind) else combined,
                "disagree": disagree,
                "identical": self.identical,
                "lengths": [len(self.response), len(self.base)],  # in characters
                "verdicts": verdicts,  # of the order (stage, base) and of (base, stage)
                "replies": [shown(reply) for reply in both],
            }
        # Of the direct reply, then of both orders. No rate counts what was forced.
        for name, told in (("unscored", why_unscored), ("forced", partial(verdict_of, forced=True))):
            if any(values := [reply and told(reply, words) for reply, words in judged]):
                line[name] = values
        errors = [reply.error for reply in replies if reply.error]
        return {**line, "errors": errors} if errors else line


@dataclass(frozen=True)
class Job:
    """One suite at one stage."""

    stage: Stage
    suite: str
    kind: Kind
    samples: dict[str, str | None]
    pairs: list[Pair]
    unpaired: int

    def is_done(self, limit: int | None) -> bool:
        """Whether the results exist, were made from these samples, and no request failed."""
        if not (file := judge_file(self.stage, self.suite)).exists():
            return False
        there = read_json(file)
        if there["samples"] != self.samples:
            log.warning("%s is from older samples, so it is judged again.", file)
            return False
        return there["limit"] == limit and not there["failed"]


def cache_file(folder: Path) -> Path:
    """The cache of a folder of runs. The runs share it, since many have the same answers of the base model."""
    return folder / "judge-cache.jsonl"


def settings(judge: Judge) -> dict[str, Any]:
    """What a verdict depends on in addition to the texts. Results with different settings are not mixed."""
    return {
        "judge": judge.model,
        "revision": judge.revision,
        "sampling": judge.sampling,  # with the arguments of the chat template
        "date": judge.date,
        "prompts": prompts.VERSION,
    }


def plan(
    run: Run,
    judge: Judge,
    *,
    stages: Collection[int] | None = None,
    suites: Iterable[str] | None = None,
    limit: int | None = None,
) -> list[Job]:
    """Finds what is not judged yet: the first `limit` rows of suites at stages. Nothing is asked.

    Each stage is compared with stage 0, even if that is not among `stages`. None = all that have samples.

    Raises:
        RunError: if a stage or suite does not exist, the samples of two stages do not belong together, or there are
            results of a different judge.
    """
    refuse_links(run.path, *WRITTEN)
    wanted = run.chosen(stages)
    check_stages(run, wanted)
    present = {(stage, suite): kind for stage in run.stages for kind in KINDS for suite in suites_of(stage, kind)}
    names = sorted({suite for stage, suite in present if stage in wanted})
    chosen = names if suites is None else sorted(set(suites))
    if (missing := set(chosen) - set(names)) or not names:
        judged = ",".join(sorted(missing)) or "instruct,safety"
        raise RunError(
            f"{run.path} has no samples of {', '.join(sorted(missing)) or 'instruct_* or safety_* tasks'} at these "
            f"stages; it has: {', '.join(names) or 'none'}. Make them with "
            f"`trace-bench evaluate {word(run.path)} --judged {judged}`."
            + "".join(suggestion(name, names) for name in sorted(missing))
        )
    kinds = {kind for (_, suite), kind in present.items() if suite in chosen}  # each has a table of its own
    for (stage, suite), kind in present.items():
        if kind in kinds:
            _check_same_judge(stage, suite, judge, limit, stage in wanted and suite in chosen)
    jobs = []
    for stage in wanted:
        if not stage.is_trained:
            log.warning(
                "Left out stage %s: it is not trained, and its samples are from weights that no longer exist.",
                stage.name,
            )
            continue
        for suite in chosen:
            if (stage, suite) not in present or not _is_current(stage, suite):
                continue
            if (run.stages[0], suite) not in present:
                raise RunError(
                    f"Stage 0 has no samples of {suite} to compare with {stage.name}. Evaluate stage 0 first."
                )
            job = _job(run.stages[0], stage, suite, present[stage, suite], limit)
            if not job.is_done(limit):
                jobs.append(job)
    return jobs


def _check_same_judge(stage: Stage, suite: str, judge: Judge, limit: int | None, again: bool) -> None:
    """Refuses existing results of a different judge; or of other rows, unless they are judged `again` now."""
    if not (file := judge_file(stage, suite)).exists():
        return
    made = read_json(file)
    there = {**made["settings"], "endpoint": made.get("endpoint", judge.endpoint)}
    now = json.loads(json.dumps({**settings(judge), "endpoint": judge.endpoint}))
    if lines := differences(there, now):
        raise RunError(
            f"{file} was made by a different judge (in the file -> asked for):\n"
            + "\n".join(lines)
            + f"\nA table needs one judge. Use the judge of the file, or delete {stage.path.parent}/*/judge; its "
            "replies stay in the cache."
        )
    if made["limit"] != limit and not again:
        raise RunError(
            f"{file} was made with --limit {made['limit']}, not {limit}, and rates over different rows cannot be "
            "compared. Use the limit of the file, or judge all stages and suites at once."
        )


def _is_current(stage: Stage, suite: str) -> bool:
    """Whether the samples were made from the weights that the stage has now."""
    check_one_checkpoint(stage)
    if not (current := judgements.is_current(stage, suite)):
        log.warning("%s, %s: the samples are from an older checkpoint. Evaluate the stage first.", stage.name, suite)
    return current


def _job(base: Stage, stage: Stage, suite: str, kind: Kind, limit: int | None) -> Job:
    rows = _read_samples(stage, suite)
    of_base = _read_samples(base, suite) if stage.index else rows
    pairs = [
        # A sample of a chat has the instruction in addition to the prompt that a template made of it.
        Pair(i, row.get("instruction", row["prompt"]), row["response"], of_base[i]["response"] if stage.index else None)
        for i, row in rows.items()
        if i in of_base and of_base[i]["prompt"] == row["prompt"]
    ]
    unpaired = len(rows.keys() | of_base.keys()) - len(pairs)
    if stage.index and not pairs:
        raise RunError(
            f"{stage.samples_file(suite)} and {base.samples_file(suite)} have no prompt in common, because they were "
            "made from different data or settings. Evaluate both again."
        )
    if unpaired:
        log.warning("%s, %s: %d rows have no partner and are left out.", stage.name, suite, unpaired)
    return Job(stage, suite, kind, sample_fingerprints(base, stage, suite), pairs[:limit], unpaired)


def _read_samples(stage: Stage, suite: str) -> dict[Any, dict[str, Any]]:
    """doc_id -> sample."""
    file, found = stage.samples_file(suite), {}
    rows = read_jsonl(file)
    for number, row in enumerate(rows, 1):
        try:
            for text in (row["prompt"], row["response"], row.get("instruction", "")):
                text.encode("utf-8")  # half a character, which no request can hold, is an error here
            if row["doc_id"] in found:
                raise ValueError(f"doc_id {row['doc_id']!r} appears twice")
        except (ValueError, AttributeError) as e:
            raise RunError(
                f"{file}, line {number} is not a sample ({e}): prompt and response must be text, and doc_id unique. "
                f"Delete it and its score, {stage.eval_file(suite)}, and evaluate again."
            ) from e
        found[row["doc_id"]] = row
    check_samples(stage, suite, list(found))
    return found


def requests_of(jobs: Iterable[Job]) -> list[Request]:
    """The requests of all jobs, pair after pair."""
    return [request for job in jobs for pair in job.pairs for request in pair.requests(job.kind)]


def judge_jobs(jobs: Sequence[Job], judge: Judge, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Asks what is not in the cache, and writes the results of each job.

    A job whose requests all failed has no results.

    Returns:
        The content of each judge/<suite>.json that was written.

    Raises:
        JudgeError: if the judge cannot be asked. Its replies so far are kept.
    """
    # All jobs at once, for one progress bar and one batch. Replies are cached, so a kill before writing loses nothing.
    replies = iter(judge.complete(requests_of(jobs)))
    results = []
    for job in jobs:
        answers = [[next(replies) for _ in pair.requests(job.kind)] for pair in job.pairs]
        lines = [pair.line(job.kind, of_pair) for pair, of_pair in zip(job.pairs, answers, strict=True)]
        flat = [reply for of_pair in answers for reply in of_pair]
        file = judge_file(job.stage, job.suite)
        file.unlink(missing_ok=True)  # while the lines are written there must be no numbers of other lines
        if flat and all(reply.error for reply in flat):
            what = "%s, %s: every request failed, so it has no results. The first failure: %s"
            log.warning(what, job.stage.name, job.suite, flat[0].error)
            continue
        result = {
            "suite": job.suite,
            "kind": job.kind.name,
            "stage": job.stage.name,
            "settings": settings(judge),
            "endpoint": judge.endpoint,
            "models": models_of(flat),  # that answered, as the endpoint calls them
            "limit": limit,
            "samples": job.samples,
            "unpaired": job.unpaired,
            "direct": judgements.direct_rate(job.kind, (line["direct"] for line in lines)),
            "failed": sum(reply.error is not None for reply in flat),
            "forced": sum(reply.forced for reply in flat),
            **ends(flat),
            # Of all replies, whether they were paid now or came from the cache.
            "requests": len(flat),
            "prompt_tokens": sum(reply.prompt_tokens for reply in flat),
            "completion_tokens": sum(reply.completion_tokens for reply in flat),
        }
        if job.stage.index:
            counts = judgements.tally(lines)
            result["pairs"] = {**counts, **judgements.rates(counts)}
        write_jsonl(file.with_suffix(".jsonl"), lines)
        write_json(file, {**result, "lines": fingerprint(file.with_suffix(".jsonl"))})
        results.append(result)
    return results


def summary(results: Sequence[dict[str, Any]], sampling: dict[str, Any]) -> str:
    """One line about what was judged, for people: how much is unscored, and which option helps."""
    unscored = sum(r["direct"]["unscored"] + r.get("pairs", {}).get("unscored", 0) for r in results)
    counts = {name: sum(r[name] for r in results) for name in ("cut", "unclosed")}
    notes = judgements.ends_in_words(counts, sum(r["requests"] for r in results), sampling)
    if counts["cut"]:
        notes.append("a new limit counts as a new judge: delete stages/*/judge of the run first")
    return f"judged {len(results)} suites ({'; '.join([f'{unscored} judgements unscored', *notes])})"
