"""From a plan to cells: the engine is started, each stage's weights are put into it, and its answers are scored."""

from __future__ import annotations

from typing import Any

from trace_bench import checks
from trace_bench.evaluate.plan import Plan
from trace_bench.evaluate.suites import evaluate_suite
from trace_bench.evaluate.tasks import Tasks, answer_tokens, check_context, run_tasks, scale_of
from trace_bench.metrics import standard_error
from trace_bench.run import Stage
from trace_bench.versions import source_commit
from trace_tasks.data import JUDGED, task_name
from trace_tasks.data.files import fingerprint, write_json, write_jsonl

#: Prompts given to the engine at once: a small run's stage is one batch, and of a large run at most one task is lost
#: when the program is killed.
BATCH = 1024


def start_engine(plan: Plan, tasks: Tasks) -> Any:
    """Starts the engine on the base model, and makes sure that what the plan asks fits into its context."""
    from trace_bench.engine import open_engine

    lengths = ("max_length", "max_model_len") if plan.backend == "hf" else ("max_model_len",)
    asked = next((plan.engine_args[name] for name in lengths if plan.engine_args.get(name)), None)
    check_context(plan, tasks, asked if isinstance(asked, int) else None)
    lm: Any = open_engine(
        plan.backend,
        plan.base["model"],
        revision=plan.base["revision"],
        max_prompt_length=plan.matrix["max_prompt_length"],
        engine_args=plan.engine_args,
        checkpoints=[s.checkpoint for s in plan.todo if s.checkpoint is not None and not s.below],
    )
    if any(plan.settings(name).get("chat_template") for name in plan.missing):
        lm.chat = plan.chat(lm.tokenizer)
    check_context(plan, tasks, lm.max_length)
    limit = plan.matrix["max_prompt_length"]
    if plan.matrix["num_fewshot"] and limit:
        for task in tasks.single.values():
            if hasattr(task.sampler, "count_in"):  # our own: demonstrations take half of the prompt's length
                task.sampler.count_in(lambda text: len(lm.tokenizer(text).input_ids), limit)
    return lm


def evaluate_plan(plan: Plan, tasks: Tasks, lm: Any) -> None:
    """Makes all missing cells, stage by stage."""
    import torch
    from tqdm import tqdm

    how = {
        "run": plan.run.identity,
        "date": plan.run.manifest.get("date"),
        # On record, but free to differ between cells: most of it is memory and speed.
        "engine_args": plan.engine_args,
        "made_with": {**checks.made_with(), "device": "cuda" if torch.cuda.is_available() else "cpu"},
        "commit": source_commit(),
    }
    order = list(plan.todo.items())
    with tqdm(total=plan.cells, desc="evaluating", unit="cell") as bar:
        for i, (stage, names) in enumerate(order):
            # Taken before loading, so that it describes the weights that are evaluated.
            made = {"checkpoint": stage.fingerprint(), **how}
            if i or stage.index:
                lm.load(stage.checkpoint, stage.below)
            if i + 1 < len(order):
                lm.prepare(order[i + 1][0].checkpoint, order[i + 1][0].below)
            for batch in _batches(plan, tasks, names):
                bar.set_postfix_str(f"{stage.name}: {', '.join(map(task_name, batch))}"[:60])
                if batch[0] in tasks.suites:
                    evaluate_suite(lm, stage, tasks.suites[batch[0]], plan.settings(batch[0]), made)
                else:
                    lm.together([s.checkpoint for s, later in order[i + 1 :] if batch[0] in later and s.checkpoint])
                    evaluate_batch(plan, tasks, lm, stage, batch, made)
                bar.update(len(batch))


def _batches(plan: Plan, tasks: Tasks, names: list[str]) -> list[list[str]]:
    """The cells that are made at once: tasks with the same settings up to `BATCH` prompts; a suite by itself."""
    batches: list[list[str]] = []
    size, before = 0, None
    for name in names:
        shared = {k: v for k, v in plan.settings(name).items() if k != "data"}
        task = tasks.single.get(name)
        rows = min(len(task.eval_docs), shared["test_rows"] or len(task.eval_docs)) if task is not None else 0
        if not batches or task is None or shared != before or size + rows > BATCH:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size, before = size + rows, shared
    return batches


def evaluate_batch(plan: Plan, tasks: Tasks, lm: Any, stage: Stage, batch: list[str], made: dict[str, Any]) -> None:
    """Makes the cells of tasks that share their settings; the engine holds the stage's weights.

    Args:
        plan: The plan.
        tasks: Its tasks.
        lm: The engine.
        stage: The stage.
        batch: The names of the cells.
        made: What the record says of how they were made.
    """
    shared = plan.settings(batch[0])
    lm.unfinished.clear()
    results, seconds = run_tasks(
        lm,
        [tasks.single[name] for name in batch],
        max_prompt_length=shared["max_prompt_length"],
        limit=shared["test_rows"],
        apply_chat_template=shared["chat_template"],
    )
    answers = sum(map(len, results["samples"].values()))
    for name in batch:
        samples = results["samples"][name]
        scores = _score(lm, stage, name, tasks.single[name], samples, results["results"][name])
        record = {
            "stage": stage.name,
            "task": name,
            "version": tasks.single[name].VERSION,
            **scores,
            "samples": fingerprint(stage.samples_file(name)),
            "settings": plan.settings(name),
            "definition": tasks.defined[name],
            "served": lm.served,
            **made,
            # Tasks that were generated together share their time by rows.
            "seconds": round(seconds * len(samples) / answers, 3),
        }
        write_json(stage.eval_file(name), record)


def _score(
    lm: Any, stage: Stage, name: str, task: Any, samples: list[dict[str, Any]], results: dict[str, Any]
) -> dict[str, Any]:
    """Writes the samples of a cell; its scores and counts."""
    used = samples[0]["filter"]  # lm-eval scores each row once for every filter of the task
    rows = sorted((r for r in samples if r["filter"] == used), key=lambda r: r["doc_id"])
    # A function that gives several scores has none of its own name.
    metrics = [m for m in task.aggregation() if m in rows[0]]
    values = {m: results[f"{m},{used}"] for m in metrics}
    write_jsonl(stage.samples_file(name), (_sample(r, metrics, name in JUDGED) for r in rows))
    return {
        "n": len(rows),
        "n_cut": lm.cut_prompts([r["arguments"][0][0] for r in rows], answer_tokens(task)),
        # An answer of which only the first token counts always ends there.
        "n_unfinished": sum(
            r["filtered_resps"][0] in lm.unfinished and r["arguments"][0][1].get("max_gen_toks") != 1 for r in rows
        ),
        "headline": metrics[0],
        "metrics": {
            m: {"value": values[m], "stderr": standard_error([r[m] for r in rows], values[m])} for m in metrics
        },
        "higher_is_better": {m: task.higher_is_better().get(m) for m in metrics},
        "scale": {m: scale_of(task.aggregation()[m], [values[m], *(r[m] for r in rows)]) for m in metrics},
    }


def _sample(row: dict[str, Any], metrics: list[str], judged: bool) -> dict[str, Any]:
    given = row["arguments"][0][0]
    return {
        "doc_id": row["doc_id"],
        # A judge sees what was asked, without the marks of the chat template.
        **({"prompt": row["doc"]["prompt"], "given": given} if judged else {"prompt": given}),
        "target": row["target"],
        "response": row["filtered_resps"][0],
        **{m: row[m] for m in metrics},
    }


def summary(plan: Plan, lm: Any, seconds: float, start: float) -> str:
    """What was done, in one line: `seconds` in all, and those of the engine's start."""
    work = lm.work
    return (
        f"evaluated {plan.cells} cells of {len(plan.todo)} stages in {seconds:.0f} s (engine start {start:.0f} s, "
        f"engine at work {work.seconds:.0f} s: {work.prompt_tokens:,} tokens read, {work.generated_tokens:,} written, "
        f"{(work.prompt_tokens + work.generated_tokens) / max(work.seconds, 1e-9):.0f} a second)"
    )
