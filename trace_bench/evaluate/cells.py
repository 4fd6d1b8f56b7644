"""From a plan to cells: starts the engine, loads each stage's weights into it, and scores its answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from trace_bench import checks
from trace_bench.evaluate import distance, reference
from trace_bench.evaluate.given import FirstTokens, nothing_to_score
from trace_bench.evaluate.likelihood import add_likelihood, reference_of, with_likelihood
from trace_bench.evaluate.plan import Plan, base_of, has_likelihood
from trace_bench.evaluate.suites import run_suite
from trace_bench.evaluate.tasks import (
    Tasks,
    answer_tokens,
    check_context,
    check_shorter_contexts,
    run_tasks,
    scale_of,
)
from trace_bench.evaluate.trained import check_engine
from trace_bench.metrics import standard_error
from trace_bench.run import Stage
from trace_bench.versions import source_commit
from trace_tasks.data import JUDGED, task_name
from trace_tasks.data.files import fingerprint, write_json, write_jsonl

#: Prompts given to the engine at once. A small run's stage is one batch; a killed large run loses at most one task.
BATCH = 1024


def start_engine(plan: Plan, tasks: Tasks, lm: Any = None) -> Any:
    """Starts the engine on the base model, and makes sure that the plan's prompts and answers fit into its context.

    If `lm`, the engine of an earlier plan of the same run, is given, it is used again.
    """
    from trace_bench.engine import open_engine

    checkpoints = [s.checkpoint for s in plan.stages if s.checkpoint is not None and not s.below]
    lengths = ("max_length", "max_model_len") if plan.backend == "hf" else ("max_model_len",)
    asked = next((plan.engine_args[name] for name in lengths if plan.engine_args.get(name)), None)
    asked = asked if isinstance(asked, int) else None
    check_context(plan, tasks, asked)
    check_shorter_contexts(plan, tasks, asked)
    base = base_of(plan.run)
    if lm is not None:
        lm.reuse(checkpoints)
    else:
        if plan.backend == "vllm":
            reference.measure(plan, tasks.single, asked)
        lm = open_engine(
            plan.backend,
            base["model"],
            revision=base["revision"],
            max_prompt_length=plan.matrix["max_prompt_length"],
            engine_args=plan.engine_args,
            checkpoints=checkpoints,
            forced=any(plan.distances.values()),
        )
    if plan.in_chat:
        lm.chat = plan.chat(lm.tokenizer)
    check_context(plan, tasks, lm.max_length)
    limit = plan.matrix["max_prompt_length"]
    if plan.matrix["num_fewshot"] and limit:
        for task in tasks.single.values():
            if hasattr(task.sampler, "count_in"):  # our own sampler: demonstrations get half of the prompt's length
                task.sampler.count_in(lambda text: len(lm.tokenizer(text).input_ids), limit)
    return lm


def evaluate_plan(plan: Plan, tasks: Tasks, lm: Any, next_stage: Stage | None = None, quiet: bool = False) -> None:
    """Makes all missing cells, stage by stage; `next_stage` is the stage that the engine probably gets afterwards."""
    import torch
    from tqdm import tqdm

    how = circumstances(plan, "cuda" if torch.cuda.is_available() else "cpu")
    order = [(stage, plan.todo.get(stage, [])) for stage in plan.stages]
    with tqdm(total=plan.cells, desc="evaluating", unit="cell", disable=quiet) as bar:
        for i, (stage, names) in enumerate(order):
            # Take the fingerprint before loading, so that it describes the weights we evaluate.
            made = {"checkpoint": stage.fingerprint(), **how}
            if stage.index or lm.served["weights"] != "base":
                lm.load(stage.checkpoint, stage.below)
            lm.check_numbers(stage.name)
            made |= check_engine(stage, lm, plan)
            following = order[i + 1][0] if i + 1 < len(order) else next_stage
            if following is not None:
                lm.prepare(following.checkpoint, following.below)
            for batch in batches(plan, tasks, names):
                bar.set_postfix_str(f"{stage.name}: {', '.join(map(task_name, batch))}"[:60])
                if batch[0] in tasks.single:
                    lm.answer_together(
                        [s.checkpoint for s, later in order[i + 1 :] if batch[0] in later and s.checkpoint]
                    )
                evaluate_batch(plan, tasks, lm, stage, batch, made)
                bar.update(len(batch))
            for name in plan.add_likelihood.get(stage, ()):
                bar.set_postfix_str(f"{stage.name}: {task_name(name)}"[:60])
                add_likelihood(plan, tasks.single[name], lm, stage, name, made)
                bar.update()
            for name in plan.distances.get(stage, ()):
                bar.set_postfix_str(f"{stage.name}: distance, {task_name(name)}"[:60])
                distance.measure(plan, lm, stage, name, made)
                bar.update()


def circumstances(plan: Plan, device: str | None) -> dict[str, Any]:
    """How cells are made now, for their records; device = None if nothing is generated."""
    return {
        "run": plan.run.identity,
        "date": plan.run.manifest.get("date"),
        # Recorded, but may differ between cells: most of it is about memory and speed.
        "engine_args": plan.engine_args,
        "made_with": {**checks.made_with(), **({"device": device} if device else {})},
        "commit": source_commit(),
    }


def batches(plan: Plan, tasks: Tasks, names: list[str]) -> list[list[str]]:
    """Groups cells that are made at once: tasks with the same settings, up to `BATCH` prompts; a suite alone."""
    found: list[list[str]] = []
    size, before = 0, None
    for name in names:
        shared = {k: v for k, v in plan.settings[name].items() if k != "data"}
        task = tasks.single.get(name)
        rows = min(len(task.eval_docs), shared["test_rows"] or len(task.eval_docs)) if task is not None else 0
        if not found or task is None or shared != before or size + rows > BATCH:
            found.append([])
            size = 0
        found[-1].append(name)
        size, before = size + rows, shared
    return found


def evaluate_batch(plan: Plan, tasks: Tasks, lm: Any, stage: Stage, batch: list[str], made: dict[str, Any]) -> None:
    """Makes the cells of tasks with the same settings, or of a suite. The engine holds the stage's weights.

    `made` is added to each record: the checkpoint and how the cell was made.
    """
    for name, scores, samples, seconds in _measured(plan, tasks, lm, batch):
        write_jsonl(stage.samples_file(name), samples)
        record = {
            "stage": stage.name,
            "task": name,
            **scores,
            "samples": fingerprint(stage.samples_file(name)),
            "settings": plan.settings[name],
            **({"definition": tasks.defined[name]} if name in tasks.defined else {}),
            "served": lm.served,
            **made,
            "seconds": round(seconds, 3),
        }
        write_json(stage.eval_file(name), record)


def _measured(
    plan: Plan, tasks: Tasks, lm: Any, batch: list[str]
) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]], float]]:
    """Yields the name, scores, samples and seconds of each cell of a batch."""
    settings = plan.settings[batch[0]]
    if batch[0] in tasks.suites:
        yield batch[0], *run_suite(lm, tasks.suites[batch[0]], settings["general_rows"])
        return
    lm.unfinished.clear()
    owners, given = {name: plan.owners[name] for name in batch}, None
    if settings.get("given"):
        given = FirstTokens(lm, {task: tasks.single[task] for task in owners.values()}, settings["given"])
    read = {n: tasks.single[n] for n in batch if plan.likelihood and n in plan.run.tasks and has_likelihood(n)}
    lm.given, lm.reference = given, partial(reference_of, lm, read, plan.max_answer) if read else None
    results, seconds = run_tasks(
        lm,
        [tasks.single[name] for name in batch],
        max_prompt_length=settings.get("max_prompt_length"),
        limit=settings["test_rows"],
        apply_chat_template=settings.get("chat_template", False),
    )
    lm.given = lm.reference = None
    answers = sum(map(len, results["samples"].values()))
    for name, task in owners.items():
        rows, found = results["samples"][task], results["results"][task]
        taken = seconds * len(rows) / answers  # the batch's time, divided by rows
        short = {}
        if given is not None:
            short["n_short"] = len({row["doc_id"] for row in rows} - {row for of, row in given.rows if of == task})
            rows, found = given.kept(task, rows)
        if not rows:
            yield name, nothing_to_score(tasks.single[name]) | short, [], taken
            continue
        scores, samples = _score(lm, name in JUDGED, tasks.single[name], rows, found)
        if name in read:
            scores, samples = with_likelihood(lm, tasks.single[name], plan.max_answer, scores, samples)
            taken += scores["likelihood"]["seconds"]
        yield name, scores | short, samples, taken


def _score(
    lm: Any, judged: bool, task: Any, samples: list[dict[str, Any]], results: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores and counts of a cell, and the lines of its samples."""
    used = samples[0]["filter"]  # lm-eval scores each row once for every filter of the task
    rows = sorted((r for r in samples if r["filter"] == used), key=lambda r: r["doc_id"])
    # A metric function that returns several scores has no score under its own name.
    metrics = [m for m in task.aggregation() if m in rows[0]]
    values = {m: results[f"{m},{used}"] for m in metrics}
    scores = {
        "version": task.VERSION,
        "n": len(rows),
        **lm.counts(rows, answer_tokens(task)),
        "headline": metrics[0],
        "metrics": {
            m: {"value": values[m], "stderr": standard_error([r[m] for r in rows], values[m])} for m in metrics
        },
        "higher_is_better": {m: task.higher_is_better().get(m) for m in metrics},
        "scale": {m: scale_of(task.aggregation()[m], [values[m], *(r[m] for r in rows)]) for m in metrics},
    }
    return scores, [_sample(r, metrics, judged) for r in rows]


def _sample(row: dict[str, Any], metrics: list[str], judged: bool) -> dict[str, Any]:
    given = row["arguments"][0][0]
    return {
        "doc_id": row["doc_id"],
        # A judge sees the question without the chat template.
        **({"prompt": row["doc"]["prompt"], "given": given} if judged else {"prompt": given}),
        "target": row["target"],
        "response": row["filtered_resps"][0],
        **{m: row[m] for m in metrics},
    }


def summary(cells: int, stages: int, lm: Any, seconds: float, start: float) -> str:
    """One line about what was done; `seconds` in total, of which `start` for starting the engine."""
    work = lm.work
    return (
        f"evaluated {cells} cells of {stages} stages in {seconds:.0f} s (engine start {start:.0f} s, "
        f"engine work {work.seconds:.0f} s: {work.prompt_tokens:,} tokens read, {work.generated_tokens:,} written, "
        f"{(work.prompt_tokens + work.generated_tokens) / max(work.seconds, 1e-9):.0f} tokens/s)"
    )
