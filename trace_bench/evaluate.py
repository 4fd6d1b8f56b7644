"""Evaluation: fills the cells of the matrix, stage x task, and those besides it, with one engine for all stages.

A cell is done when its file `eval/<task>.json` exists and was made from the checkpoint that the stage has now. Done
cells are skipped, so an interrupted evaluation goes on where it was. Nothing here asks which method trained a stage.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from trace_bench import checks, models
from trace_bench.checkpoints import check_checkpoints, checkpoint_fingerprint, warn_of_tokenizers
from trace_bench.engine import FREE
from trace_bench.keys import refuse_secrets
from trace_bench.run import WRITTEN, Run, RunError, Stage, is_file_name, locked, source_commit
from trace_bench.tables import task_name
from trace_bench.tasks import check_stages, data_record, load_suites, load_tasks, task_manager
from trace_tasks import data
from trace_tasks.data.files import fingerprint, refuse_links, write_json, write_jsonl
from trace_tasks.tokens import Chat, PromptError, prompt_ids

log = logging.getLogger(__name__)

#: Prompts given to the engine in one go: a small run's stage is one batch, and of a large run no more than one task
#: is lost when the program is killed.
BATCH = 1024
#: The settings of what is measured besides the matrix (`CLConfig`). A manifest has them only where they are set.
BESIDES = ("general", "general_stages", "general_rows", "judged", "judged_rows", "judged_max_new_tokens")


def evaluate(
    run: Run,
    *,
    stages: Iterable[int] | None = None,
    cells: str | None = None,
    backend: str | None = None,
    engine_args: dict[str, Any] | None = None,
    data_path: str | None = None,
    besides: dict[str, Any] | None = None,
) -> int:
    """Evaluates every missing cell of a run: its matrix, and what is measured besides.

    Args:
        run: The run. Its configuration says how many rows, how long answers, which backend.
        stages: Indices of the stages; None = all that are trained.
        cells: Which tasks each stage is evaluated on: "seen", "all", or "own" (that of the stage alone); None = as the
            run says. The base model and checkpoints that belong to no task are always evaluated on all tasks.
        backend: "vllm" or "hf" instead of the run's own.
        engine_args: Engine arguments beside the run's own; they win, and null takes one of its own away.
        data_path: Where the data is now, if it was moved; its fingerprint must be the run's.
        besides: Settings of `BESIDES` instead of the run's own.

    Returns:
        The number of cells evaluated now.

    Raises:
        RunError: if a cell was made with other settings, the data or the base model is not the run's, a checkpoint has
            changed, or another process evaluates one of the stages.
        data.DataError: if a suite or a set is not known, or its data is not there.
    """
    refuse_links(run.path, *WRITTEN)
    wanted = run.indices(stages)
    chosen = [s for s in run.stages if s.index in wanted]
    with ExitStack() as locks:
        for stage in chosen:
            if stage.is_trained:
                locks.enter_context(locked(stage.path, "evaluate"))
        return _evaluate(run, chosen, cells, backend, engine_args, data_path, besides)


def _evaluate(
    run: Run,
    chosen: list[Stage],
    cells: str | None,
    backend: str | None,
    engine_args: dict[str, Any] | None,
    data_path: str | None,
    besides: dict[str, Any] | None,
) -> int:
    config = {**run.manifest["config"], **(besides or {})}
    which = cells or config.get("cells", "seen")
    settings = {
        "backend": backend or config.get("backend", "vllm"),
        "test_rows": config.get("test_rows"),
        "max_prompt_length": config.get("max_prompt_length"),
        "max_new_tokens": config.get("max_new_tokens"),
        "chat_template": config.get("chat_template", False),
        "num_fewshot": config.get("num_fewshot"),
    }
    template_args = config.get("chat_template_args") or {}
    if template_args and settings["chat_template"]:
        settings["chat_template_args"] = template_args
    seed = config.get("seed", 1234)
    if settings["num_fewshot"]:  # what else decides the prompts and the answers with demonstrations
        from trace_tasks.utils import ICL_VERSION

        settings["icl"] = {"version": ICL_VERSION, "seed": seed}
    engine_args = {**(config.get("engine_args") or {}), **(engine_args or {})}
    engine_args = {k: v for k, v in engine_args.items() if v is not None}
    refuse_secrets(engine_args, "engine_args")
    if config.get("trust_remote_code"):
        engine_args.setdefault("trust_remote_code", True)
    trusted = engine_args.get("trust_remote_code", False)
    settings["engine"] = {k: v for k, v in engine_args.items() if k not in FREE}
    for stage in chosen:
        if not stage.is_trained:
            log.warning("Stage %s is not trained yet and left out.", stage.name)
    suites = data.expand(config.get("general", ()), data.SUITES)
    judged = data.expand(config.get("judged", ()), data.JUDGED)
    if judged:
        checks.use_data(run, data_path)  # demo data brings prompts of its own
    more = _settings_besides(run, config, trusted, suites, judged, {k: settings[k] for k in ("backend", "engine")})
    last = {0, len(run.stages) - 1}
    measured = last if config.get("general_stages", "last") == "last" else {s.index for s in chosen}
    checks.verify(run, chosen)
    checks.check_one_setting(run, dict.fromkeys(run.tasks, settings) | more)
    plan: dict[Stage, dict[str, dict[str, Any]]] = {}
    for stage in chosen:
        if stage.is_trained:
            all_cells = dict.fromkeys(seen_tasks(run, stage, which), settings)
            todo = missing_cells(stage, all_cells | more if stage.index in measured else all_cells)
            if todo:
                plan[stage] = todo
    missing = sum(map(len, plan.values()))
    if not plan:
        return 0

    tasks = checks.verify(run, plan, data_path, [*run.tasks, *judged])
    if settings["chat_template"]:
        model = run.manifest["model"]
        tokenizer = models.load_tokenizer(models.resolve_model(model["name"]), model.get("revision"), trusted)
        check_room(make_chat(config, run, tokenizer), settings["max_prompt_length"])
    check_checkpoints(run, plan, settings["backend"], trusted)
    warn_of_tokenizers(run, plan, trusted)
    # What the tasks are, before they get the limits of this run.
    defined = {name: checks.defined_as(task) for name, task in tasks.items()}
    checks.check_one_definition(run, defined)
    for line in checks.other_versions(run):
        log.warning("Cells of the run were made with another version of what makes scores: %s.", line)
    for name, task in tasks.items():
        limit = (more.get(name) or settings)["max_new_tokens"]
        if limit is not None:
            kwargs = task.config.generation_kwargs
            kwargs["max_gen_toks"] = min(kwargs.get("max_gen_toks", 256), limit)
    groups = load_suites([s for s in suites if any(s in todo for todo in plan.values())])
    for name, task in tasks.items():
        # As the training prompts are made, whatever a task from elsewhere says of shots.
        _prepare(task, (more.get(name) or settings)["num_fewshot"] or 0, seed)
    for group in groups.values():
        for task in group.get_all_tasks():
            _prepare(task)
    _check_suites(plan, groups, settings["backend"], engine_args.get("max_model_len") or engine_args.get("max_length"))

    import torch
    from tqdm import tqdm

    from trace_bench.engine import open_engine

    started = time.perf_counter()
    lm: Any = open_engine(
        settings["backend"],
        models.resolve_model(run.manifest["model"]["name"]),
        revision=run.manifest["model"].get("revision"),
        max_prompt_length=settings["max_prompt_length"],
        engine_args=engine_args,
        checkpoints=[s.checkpoint for s in plan if s.checkpoint is not None and not s.below],
    )
    if any(s.get("chat_template") for todo in plan.values() for s in todo.values()):
        lm.chat = make_chat(config, run, lm.tokenizer)
    _check_suites(plan, groups, settings["backend"], lm.max_length)
    for name in {name: None for todo in plan.values() for name in todo if name in tasks}:
        prompt, answer = (more.get(name) or settings)["max_prompt_length"] or 1, answer_tokens(tasks[name])
        if prompt + answer > lm.max_length:
            raise RunError(
                f"{name}: {prompt} tokens of a prompt and {answer} of an answer do not fit into the engine's context "
                f"of {lm.max_length}, so prompts would be cut to other lengths than the run says. Give --engine-args a "
                "larger max_model_len (vllm) or max_length (hf), or begin with a smaller max_prompt_length or "
                "max_new_tokens."
            )
    if settings["num_fewshot"] and settings["max_prompt_length"]:
        for task in tasks.values():
            if hasattr(task.sampler, "count_in"):  # our own: demonstrations take half of the prompt's length
                task.sampler.count_in(lambda text: len(lm.tokenizer(text).input_ids), settings["max_prompt_length"])
    made_by = {
        "run": run.identity,
        "date": run.manifest.get("date"),
        # On record, but free to differ between cells: most of it is memory and speed.
        "engine_args": engine_args,
        "made_with": {**checks.made_with(), "device": "cuda" if torch.cuda.is_available() else "cpu"},
        "commit": source_commit(),
    }
    ready = time.perf_counter() - started
    order = list(plan.items())
    with tqdm(total=missing, desc="evaluating", unit="cell") as bar:
        for i, (stage, todo) in enumerate(order):
            # Of the weights that are loaded now, whatever happens to the files while the engine works.
            made = {"checkpoint": checkpoint_fingerprint(stage), **made_by}
            if i or stage.index:
                lm.load(stage.checkpoint, stage.below)
            if i + 1 < len(order):
                lm.prepare(order[i + 1][0].checkpoint, order[i + 1][0].below)
            for batch in _batches(todo, tasks):
                bar.set_postfix_str(f"{stage.name}: {', '.join(map(task_name, batch))}"[:60])
                if batch[0] in groups:
                    _evaluate_suite(lm, stage, groups[batch[0]], todo[batch[0]], made)
                else:
                    lm.together([s.checkpoint for s, later in order[i + 1 :] if batch[0] in later and s.checkpoint])
                    mine = {n: tasks[n] for n in batch}
                    _evaluate_cells(lm, stage, mine, {n: todo[n] for n in batch}, made, defined)
                bar.update(len(batch))
    seconds, work = time.perf_counter() - started, lm.work
    print(
        f"evaluated {missing} cells of {len(plan)} stages in {seconds:.0f} s (engine start {ready:.0f} s, engine at "
        f"work {work.seconds:.0f} s: {work.prompt_tokens:,} tokens read, {work.generated_tokens:,} written, "
        f"{(work.prompt_tokens + work.generated_tokens) / max(work.seconds, 1e-9):.0f} a second)",
        flush=True,
    )
    return missing


def _settings_besides(
    run: Run, config: dict[str, Any], trusted: bool, suites: list[str], judged: list[str], shared: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The settings of the cells besides the matrix: sets to be judged, then general-ability suites.

    Neither takes the limits of the matrix: suites have prompts and lengths of their own.
    """
    settings: dict[str, dict[str, Any]] = {}
    template_args = config.get("chat_template_args")
    if judged:
        model = run.manifest["model"]
        base = models.resolve_model(model["name"])
        tokenizer = models.load_tokenizer(base, model.get("revision"), trusted)
        for name in judged:
            settings[name] = {
                **shared,
                "test_rows": config.get("judged_rows"),
                "max_prompt_length": None,
                "max_new_tokens": config.get("judged_max_new_tokens"),
                "chat_template": tokenizer.chat_template is not None,
                **({"chat_template_args": template_args} if template_args and tokenizer.chat_template else {}),
                "num_fewshot": None,
                "data": data.source_fingerprint(name),
            }
    for name in suites:
        settings[name] = {
            **shared,
            "general_rows": config.get("general_rows"),
            "lm_eval": version("lm-eval"),  # it brings the tasks of the suites
            "data": data.source_fingerprint(name),
        }
    return settings


def make_chat(config: Any, run: Run, tokenizer: Any) -> Chat:
    """What renders the chat prompts of a run: in training, in evaluation, and of the answers for the judges.

    Args:
        config: The run's configuration, or that of its manifest.
        run: The run, whose date a template is told.
        tokenizer: The base model's.

    Raises:
        PromptError: if it has no chat template.
    """
    arguments = config.get("chat_template_args") if isinstance(config, dict) else config.chat_template_args
    return Chat(tokenizer, arguments, run.manifest.get("date"))


def check_room(chat: Chat, limit: int | None) -> None:
    """Refuses a chat template that leaves no room for a question within the limit of a prompt.

    Raises:
        PromptError: with both lengths.
    """
    ids = prompt_ids(chat.tokenizer, [chat([{"role": "user", "content": "?"}])], None, chat)[0]
    if limit is not None and len(ids) >= limit:
        raise PromptError(
            f"The chat template takes {len(ids) - 1} tokens by itself and max_prompt_length is {limit}: raise it."
        )


def _check_suites(plan: dict[Stage, Any], groups: dict[str, Any], backend: str, context: int | None) -> None:
    """Refuses what would fail half-way: answers as long as the context, likelihoods behind a soft prompt in vLLM."""
    for name, group in groups.items():
        longest = max((answer_tokens(task) for task in group.get_all_tasks()), default=0)
        if context is not None and longest >= context:
            raise RunError(
                f"{name} generates up to {longest} tokens and the engine's context has {context}, prompt included. "
                "Give --engine-args a larger max_model_len (vllm) or max_length (hf), or leave the suite out."
            )
        if backend == "vllm" and any(task.OUTPUT_TYPE == "multiple_choice" for task in group.get_all_tasks()):
            for stage, todo in plan.items():
                if name in todo and models.soft_prompt(stage.checkpoint) is not None:
                    raise RunError(
                        f"{name} compares likelihoods, which vLLM does not give behind the soft prompt of "
                        f"{stage.name}. Leave the suite out, or evaluate the whole run with --backend hf."
                    )


def answer_tokens(task: Any) -> int:
    """The most tokens that a task generates; 0 = it compares likelihoods."""
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    return task.config.generation_kwargs.get("max_gen_toks", 256)  # lm-eval's own default


def seen_tasks(run: Run, stage: Stage, which: str) -> list[str]:
    """The columns of the matrix that a stage is evaluated on (`cells`)."""
    if which == "all" or stage.task is None:
        return run.tasks
    own = run.tasks.index(stage.task)
    return run.tasks[own if which == "own" else 0 : own + 1]


def missing_cells(stage: Stage, wanted: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cells that a stage has still to be evaluated on.

    Args:
        stage: A stage of a run.
        wanted: Name of the cell -> the settings under which it is wanted.

    Returns:
        Those of `wanted` that are not there, or were made from other weights than the stage has now.
    """
    todo = {}
    current = checkpoint_fingerprint(stage)
    for name, settings in wanted.items():
        if stage.eval_file(name).exists():
            if checks.read_cell(stage, name)["checkpoint"] == current:
                continue
            log.warning("%s was made from an older checkpoint and is made anew.", stage.eval_file(name))
        todo[name] = settings
    return todo


def _batches(todo: dict[str, dict[str, Any]], tasks: dict[str, Any]) -> list[list[str]]:
    """The cells that are done in one go: tasks with the same settings up to `BATCH` prompts, a suite by itself."""
    batches: list[list[str]] = []
    size = 0
    before: dict[str, Any] | None = None
    for name, settings in todo.items():
        shared = {k: v for k, v in settings.items() if k != "data"}
        rows = min(len(tasks[name].eval_docs), settings["test_rows"] or 10**9) if name in tasks else 0
        if not batches or name not in tasks or shared != before or size + rows > BATCH:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size, before = size + rows, shared
    return batches


def _evaluate_cells(
    lm: Any,
    stage: Stage,
    tasks: dict[str, Any],
    settings: dict[str, dict[str, Any]],
    made: dict[str, Any],
    defined: dict[str, str],
) -> None:
    shared = settings[next(iter(tasks))]
    lm.unfinished.clear()
    results, seconds = _run(
        lm,
        list(tasks.values()),
        max_prompt_length=shared["max_prompt_length"],
        limit=shared["test_rows"],
        apply_chat_template=shared["chat_template"],
    )
    for name, task in tasks.items():
        samples = results["samples"][name]
        used = samples[0]["filter"]  # lm-eval scores each row once for every filter of the task
        rows = sorted((r for r in samples if r["filter"] == used), key=lambda r: r["doc_id"])
        # A function that gives several scores has none of its own name.
        metrics = [m for m in task.aggregation() if m in rows[0]]
        values = {m: results["results"][name][f"{m},{used}"] for m in metrics}
        write_jsonl(stage.samples_file(name), (_sample(r, metrics, name in data.JUDGED) for r in rows))
        write_json(
            stage.eval_file(name),
            {
                "stage": stage.name,
                "task": name,
                "version": task.VERSION,
                "n": len(rows),
                "n_cut": lm.cut_prompts([r["arguments"][0][0] for r in rows], answer_tokens(task)),
                # An answer of which the first token counts ends there.
                "n_unfinished": sum(r["filtered_resps"][0] in lm.unfinished for r in rows if not _is_one_token(r)),
                "headline": metrics[0],
                "metrics": {
                    m: {"value": values[m], "stderr": _stderr([r[m] for r in rows], values[m])} for m in metrics
                },
                "higher_is_better": {m: task.higher_is_better().get(m) for m in metrics},
                "scale": {m: _scale(task.aggregation()[m], [values[m], *(r[m] for r in rows)]) for m in metrics},
                "samples": fingerprint(stage.samples_file(name)),
                "settings": settings[name],
                "definition": defined[name],
                "served": lm.served,
                **made,
                # Tasks that were generated together share their time by rows.
                "seconds": round(seconds * len(samples) / sum(len(s) for s in results["samples"].values()), 3),
            },
        )


def _is_one_token(row: dict[str, Any]) -> bool:
    return row["arguments"][0][1].get("max_gen_toks") == 1


def _prepare(task: Any, num_fewshot: int | None = None, seed: int = 1234) -> None:
    """Sets what lm-eval's `simple_evaluate` sets, and makes a task build its prompts for the first stage only.

    `simple_evaluate` itself would take most of a second for a description of the machine, at every stage.

    Args:
        task: An lm-eval task.
        num_fewshot: Demonstrations, unless the task itself says 0; None leaves it to the task.
        seed: By which demonstrations are drawn; lm-eval's own for the suites.
    """
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed)
    build = task.build_all_requests
    built: list[bool] = []

    def once(**kwargs: Any) -> None:
        if not built:
            with _without_bars():
                build(**kwargs)
            built.append(True)
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = once


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps lm-eval from a bar for each task whose prompts it makes: MMLU has 57."""
    from lm_eval.api import task

    theirs = task.tqdm
    task.tqdm = partial(theirs, disable=True)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        task.tqdm = theirs  # type: ignore[misc]


def _run(lm: Any, tasks: list[Any], max_prompt_length: int | None, **kwargs: Any) -> tuple[Any, float]:
    """lm-eval's results and the seconds they took."""
    import lm_eval

    lm.max_prompt_length = max_prompt_length
    started = time.perf_counter()
    results = lm_eval.evaluate(lm, task_manager().load(tasks), bootstrap_iters=0, log_samples=True, **kwargs)
    return results, time.perf_counter() - started


def _sample(row: dict[str, Any], metrics: list[str], judged: bool) -> dict[str, Any]:
    given = row["arguments"][0][0]
    return {
        "doc_id": row["doc_id"],
        # A judge is shown what was asked, without the marks of the chat template.
        **({"prompt": row["doc"]["prompt"], "given": given} if judged else {"prompt": given}),
        "target": row["target"],
        "response": row["filtered_resps"][0],
        **{m: row[m] for m in metrics},
    }


def _evaluate_suite(
    lm: Any,
    stage: Stage,
    group: Any,
    settings: dict[str, Any],
    made: dict[str, Any],
) -> None:
    """One cell for a suite of lm-eval tasks, its value being lm-eval's own aggregate."""
    tasks = {task.task_name: task for task in group.get_all_tasks()}
    wanted = settings["general_rows"]  # of the suite; lm-eval's limit is that of each subtask
    limit = None if wanted is None else math.ceil(wanted / len(tasks))
    results, seconds = _run(lm, [group], max_prompt_length=None, limit=limit)
    subtasks: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    for name, task in tasks.items():
        rows = [_suite_sample(name, task, same) for same in _by_doc(results["samples"][name])]
        samples += rows
        subtasks[name] = {
            "version": task.VERSION,
            "n": len(rows),
            "n_cut": _cut_prompts(lm, task),
            "metrics": {
                _metric_name(key): {"value": value, "stderr": _stderr([r[_metric_name(key)] for r in rows])}
                for key, value in results["results"][name].items()
                if "," in key and "_stderr" not in key
            },
        }
    metrics, better, scale = {}, {}, {}
    for aggregate in group.aggregate_metric_list:
        sizes = [s["n"] if aggregate.weight_by_size else 1 for s in subtasks.values()]
        for kind in aggregate.filter_list:
            key = f"{aggregate.metric},{kind}"
            errors = [s["metrics"][_metric_name(key)]["stderr"] for s in subtasks.values()]
            metrics[_metric_name(key)] = {
                "value": results["results"][group.name][key],
                "stderr": _stderr_of_mean(errors, sizes),
            }
            better[_metric_name(key)] = next(iter(tasks.values())).higher_is_better().get(aggregate.metric)
            scale[_metric_name(key)] = _scale(None, [r.get(_metric_name(key)) for r in samples])
    write_jsonl(stage.samples_file(group.name), samples)
    write_json(
        stage.eval_file(group.name),
        {
            "stage": stage.name,
            "task": group.name,
            "version": group.version,
            "n": len(samples),
            "n_cut": sum(s["n_cut"] for s in subtasks.values()),
            "headline": next(iter(metrics)),
            "metrics": metrics,
            "higher_is_better": better,
            "scale": scale,
            "subtasks": subtasks,
            "samples": fingerprint(stage.samples_file(group.name)),
            "settings": settings,
            "served": lm.served,
            **made,
            "seconds": round(seconds, 3),
        },
    )


def _metric_name(key: str) -> str:
    """lm-eval's "metric,filter"; without the filter where there is only one, which is called none."""
    return key.removesuffix(",none")


def _by_doc(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """lm-eval's rows of one task, those of one document (one for each filter) together."""
    docs: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        docs.setdefault(row["doc_id"], []).append(row)
    return [docs[i] for i in sorted(docs)]


def _suite_sample(name: str, task: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of a suite's samples from a document's rows."""
    row = rows[0]
    sample = {"task": name, "doc_id": row["doc_id"], "prompt": row["arguments"][0][0]}
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = [response[0] for response in row["filtered_resps"]]
        sample |= {
            "choices": [arguments[1] for arguments in row["arguments"]],
            "loglikelihoods": likelihoods,
            "target": int(row["target"]),
            "response": likelihoods.index(max(likelihoods)),
        }
    else:
        sample |= {"target": row["target"], "response": row["resps"][0][0]}  # as generated: filters see parts of it
    return sample | {_metric_name(f"{m},{row['filter']}"): row[m] for row in rows for m in row["metrics"]}


def _cut_prompts(lm: Any, task: Any) -> int:
    """How many documents of a task had a prompt longer than the engine's context, so that lm-eval cut its beginning."""
    room = lm.max_length - answer_tokens(task)
    cut = set()
    for instance in task.instances:
        text = "".join(a for a in instance.args if isinstance(a, str))
        # A token is a byte at the least, so most texts need not be tokenized.
        if len(text.encode()) > room and len(lm.tok_encode(text)) > room:
            cut.add(instance.doc_id)
    if cut:
        log.warning(
            "%s: %d prompts are longer than the engine's context (%d tokens with the answer) and were cut on the left, "
            "by shots first. --engine-args '{\"max_model_len\": N}' makes room.",
            task.task_name,
            len(cut),
            lm.max_length,
        )
    return len(cut)


def _scale(aggregation: Any, values: Iterable[Any]) -> int | None:
    """The scale of a metric, as `tables.Unit` has it.

    100 for lm-eval's BLEU, chrF and TER, which are made by their aggregation. Of any other metric nobody says it: its
    scores are taken for fractions of 1 as long as all values, of the rows and of the task, are between 0 and 1.
    """
    from lm_eval.api.registry import get_aggregation

    if aggregation in [get_aggregation(name) for name in ("bleu", "chrf", "chrf++", "ter")]:
        return 100
    return 1 if all(-1e-6 <= float(v) <= 1 + 1e-6 for v in values if isinstance(v, Real)) else None


def _stderr(values: list[Any], score: float | None = None) -> float | None:
    """Standard error of the mean; None for a single row, where a row's value is no number, or the score no mean."""
    n = len(values)
    if n < 2 or not all(isinstance(v, Real) for v in values):
        return None
    mean = sum(values) / n
    if score is not None and not math.isclose(mean, score, rel_tol=1e-9, abs_tol=1e-9):
        return None
    return (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5


def _stderr_of_mean(errors: list[float | None], weights: list[int]) -> float | None:
    """Standard error of a weighted mean of independent means; None if one of theirs is not known."""
    if any(e is None for e in errors):
        return None
    return sum((w * e) ** 2 for w, e in zip(weights, errors, strict=True) if e is not None) ** 0.5 / sum(weights)


def measured_run(path: str | Path) -> Run | None:
    """The run at a path, of which something is measured already; else None."""
    if not (Path(path) / "manifest.json").exists():
        return None
    run = Run.open(path)
    return run if any(True for stage in run.stages for _ in stage.path.glob("eval/*.json")) else None


def external_run(
    path: str | Path,
    checkpoints: dict[str, str],
    *,
    model: str,
    tasks: list[str],
    settings: dict[str, Any],
    data_path: str | None = None,
    chain: bool = False,
    renamed_base: bool = False,
) -> Run:
    """Makes a run of checkpoints that were trained elsewhere.

    Args:
        path: The run directory. One in which nothing was measured, since the first attempt failed, is begun anew.
        checkpoints: Name -> folder of a PEFT adapter or a full model, in the order of training. A name that is a
            task stands for the stage after that task, and if all do, in order, OP and BWT are defined. Those that the
            run has need not be given again: new ones become its next stages.
        model: The base model.
        tasks: The columns of the matrix; none = only what is measured besides it.
        settings: Evaluation settings, as in the config of a run.
        data_path: Where the data is; None takes TRACE_DATA.
        chain: Whether each adapter was trained on the base with those before it merged in.
        renamed_base: Whether adapters may name another base model, since this is a copy under another name.

    Raises:
        RunError: if a folder holds no checkpoint, or one that does not fit the base model or its engine.
        data.DataError: for a suite, set or task that is not known, or without its data.
    """
    refuse_secrets({"model": model, "checkpoints": checkpoints, **settings}, "the run's")
    for name, folder in checkpoints.items():
        files = {p.name for p in Path(folder).glob("*")}
        if not files & {"adapter_config.json", "config.json"}:
            raise RunError(f"--checkpoint {name}={folder}: no adapter (adapter_config.json) or model (config.json).")
        if not any(f.endswith(".safetensors") for f in files):
            raise RunError(f"--checkpoint {name}={folder}: no .safetensors file; other formats are not loaded.")
        if not is_file_name(name):
            raise RunError(
                f"--checkpoint {name}=...: a name becomes a folder; it cannot hold '/' or control characters, "
                "or begin with '.'."
            )
    rows = data.open_data(tasks, data_path)
    rows.use()
    rows.check(["test"])
    for kind, known in (("general", data.SUITES), ("judged", data.JUDGED)):
        for name in data.expand(settings.get(kind, ()), known):
            data.source_fingerprint(name)  # its data is there
    base = models.resolve_model(model)
    loaded = load_tasks(tasks)
    check_stages(loaded)
    file = Path(path) / "manifest.json"
    began = Run.open(path).manifest if file.exists() else {}
    there = began.get("checkpoints", {})
    failed = bool(there) and measured_run(path) is None
    if failed:
        began = there = {}
    in_order = sorted(checkpoints, key=lambda name: list(there).index(name) if name in there else len(there))
    if chain and list(checkpoints) != in_order:
        raise RunError(
            f"--checkpoint {', '.join(checkpoints)}: the adapters of a chain lie on each other in a fixed order, which "
            f"is {', '.join(there)} in {path}. Further ones go on top: give them alone, or behind these."
        )
    given = {name: str(Path(folder).absolute()) for name, folder in checkpoints.items()}
    renamed = {"renamed_base": True} if renamed_base else {}
    manifest = {
        "method": "external",
        "model": {"name": model, "path": base, "revision": models.pinned_revision(base)},
        "tasks": tasks,
        "task_versions": {name: task.VERSION for name, task in loaded.items()},
        "task_definitions": checks.definitions(loaded),
        "checkpoints": {name: given.get(name, folder) for name, folder in there.items()} or given,
        **({"chain": True} if chain else {}),
        **(renamed if not there else {k: began[k] for k in began if k == "renamed_base"}),
        "date": time.strftime("%Y-%m-%d"),
        "data": data_record(rows, loaded),
        "config": settings,
    }
    # Before anything is recorded. Earlier ones that are not given again may be evaluated and gone.
    run = Run(Path(path), {**manifest, "checkpoints": {**there, **given}, **renamed})
    new = [stage for name, stage in zip(run.manifest["checkpoints"], run.stages[1:], strict=True) if name in given]
    trusted = (settings.get("engine_args") or {}).get("trust_remote_code", False)
    check_checkpoints(run, new, settings["backend"], trusted)
    if failed:
        file.unlink()
    run = Run.create(path, manifest)
    if there and (given.keys() - there.keys() or renamed.keys() - began.keys()):
        write_json(file, {**run.manifest, "checkpoints": {**there, **given}, **renamed})
        run = Run.open(path)
    return run
