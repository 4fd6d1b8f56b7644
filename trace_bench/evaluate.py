"""Evaluation: fills the cells of the matrix, stage x task, with one engine for all stages.

A cell is done when its file `eval/<task>.json` exists and was made from the checkpoint that the stage has now. Done
cells are skipped, so an interrupted evaluation goes on where it was. Nothing here asks which method trained a stage.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trace_bench import data, models
from trace_bench.run import Run, RunError, Stage, differences, fingerprint, read_json, write_json, write_jsonl

log = logging.getLogger(__name__)

#: Prompts given to the engine in one go: a small run's stage is one batch, and of a large run no more than one task
#: is lost when the program is killed.
BATCH = 1024


def evaluate(
    run: Run,
    *,
    stages: Iterable[int] | None = None,
    cells: str | None = None,
    backend: str | None = None,
    engine_args: dict[str, Any] | None = None,
    data_path: str | None = None,
) -> int:
    """Evaluates every missing cell of a run.

    Args:
        run: The run. Its configuration says how many rows, how long answers, which backend.
        stages: Indices of the stages; None = all that are trained.
        cells: Which tasks each stage is evaluated on: "seen", "all", or "own" (that of the stage alone); None = as the
            run says. The base model and checkpoints that belong to no task are always evaluated on all tasks.
        backend: "vllm" or "hf" instead of the run's own.
        engine_args: Engine arguments instead of the run's own.
        data_path: Where the data is now, if it was moved; its fingerprint must be the run's.

    Returns:
        The number of cells evaluated now.

    Raises:
        RunError: if a cell was made with other settings, the data is not the run's, or a checkpoint has changed.
    """
    config = run.manifest["config"]
    which = cells or config.get("cells", "seen")
    settings = {
        "backend": backend or config.get("backend", "vllm"),
        "test_rows": config.get("test_rows"),
        "max_prompt_length": config.get("max_prompt_length"),
        "max_new_tokens": config.get("max_new_tokens"),
        "chat_template": config.get("chat_template", False),
        "num_fewshot": config.get("num_fewshot"),
    }
    wanted = set(range(len(run.stages))) if stages is None else set(stages)
    unknown = wanted - {s.index for s in run.stages}
    if unknown:
        raise RunError(f"There is no stage {sorted(unknown)}: the run has 0 to {len(run.stages) - 1}.")
    chosen = [s for s in run.stages if s.index in wanted]
    for stage in chosen:
        if not stage.is_trained:
            log.warning("Stage %s is not trained yet and left out.", stage.name)
    plan = {s: todo for s in chosen if s.is_trained and (todo := missing_cells(run, s, which, settings))}
    missing = sum(map(len, plan.values()))
    if not plan:
        return 0

    use_data(run, data_path)
    for stage in plan:
        _check_checkpoint(stage)  # before the engine starts
    tasks = data.load_tasks(run.tasks)
    for name, task in tasks.items():
        if run.manifest["task_versions"].get(name, task.VERSION) != task.VERSION:
            raise RunError(
                f"{name} has version {task.VERSION} now, the run was begun with "
                f"{run.manifest['task_versions'][name]}: their scores cannot be compared. Use the program's older "
                "version, or begin a new run."
            )

        if settings["max_new_tokens"] is not None:
            kwargs = task.config.generation_kwargs
            kwargs["max_gen_toks"] = min(kwargs.get("max_gen_toks", 256), settings["max_new_tokens"])

    from tqdm import tqdm

    from trace_bench.engine import open_engine

    started = time.perf_counter()
    engine_args = dict((config.get("engine_args") or {}) if engine_args is None else engine_args)
    if config.get("trust_remote_code"):
        engine_args.setdefault("trust_remote_code", True)
    lm = open_engine(
        settings["backend"],
        models.resolve_model(run.manifest["model"]["name"]),
        revision=run.manifest["model"].get("revision"),
        max_prompt_length=settings["max_prompt_length"],
        engine_args=engine_args,
    )
    if settings["num_fewshot"] and settings["max_prompt_length"]:
        for task in tasks.values():
            if hasattr(task.sampler, "count_in"):  # our own: demonstrations take half of the prompt's length
                task.sampler.count_in(lambda text: len(lm.tokenizer(text).input_ids), settings["max_prompt_length"])
    ready = time.perf_counter() - started
    with tqdm(total=missing, desc="evaluating", unit="cell") as bar:
        for i, (stage, todo) in enumerate(plan.items()):
            if i or stage.index:
                lm.load(stage.checkpoint)
            for group in _batches(todo, tasks, settings["test_rows"]):
                bar.set_postfix_str(f"{stage.name}: {', '.join(group)}"[:60])
                _evaluate_cells(lm, stage, {name: tasks[name] for name in group}, settings, engine_args)
                bar.update(len(group))
    print(
        f"evaluated {missing} cells of {len(plan)} stages in {time.perf_counter() - started:.0f} s "
        f"(engine start {ready:.0f} s)",
        flush=True,
    )
    return missing


def missing_cells(run: Run, stage: Stage, which: str, settings: dict[str, Any]) -> list[str]:
    """The tasks that a stage has still to be evaluated on.

    Raises:
        RunError: if a cell was made with other settings; the message lists the differing keys.
    """
    if which == "all" or stage.task is None:
        tasks = run.tasks
    else:
        own = run.tasks.index(stage.task)
        tasks = run.tasks[own if which == "own" else 0 : own + 1]
    todo = []
    current = checkpoint_fingerprint(stage)
    for task in tasks:
        file = stage.eval_file(task)
        if file.exists():
            cell = read_json(file)
            lines = differences(cell["settings"], settings)
            if lines:
                raise RunError(
                    f"{file} was made with other settings (there -> asked for):\n"
                    + "\n".join(lines)
                    + f"\nOne matrix needs one setting. Use the old one, or delete {run.path}/stages/*/eval."
                )
            if cell["checkpoint"] == current:
                continue
            log.warning("%s was made from an older checkpoint and is made anew.", file)
        todo.append(task)
    return todo


def checkpoint_fingerprint(stage: Stage) -> str | None:
    """What identifies the weights of a stage; None for the base model, which the manifest identifies."""
    if stage.index == 0:
        return None
    if stage.external is not None:
        return fingerprint(stage.external)
    return read_json(stage.train_file)["checkpoint"]


def _check_checkpoint(stage: Stage) -> None:
    path = stage.checkpoint
    if path is None:
        return
    if stage.external is None and fingerprint(path) != checkpoint_fingerprint(stage):
        raise RunError(
            f"{path} is not what the training of the stage wrote (its fingerprint differs): it was changed or "
            f"damaged. Restore it, or delete {stage.train_file} to train the stage anew."
        )


def use_data(run: Run, path: str | None = None) -> None:
    """Points TRACE_DATA to the run's data and makes sure that it is the same data.

    Raises:
        RunError: if the data behind the path has another fingerprint than the run began with.
    """
    expected = run.manifest["data"]["fingerprint"]
    if not expected:
        return
    source = path or ("demo" if run.manifest["data"]["demo"] else run.manifest["data"]["path"])
    root = data.find_data(source)
    if path is None and "reasoning" in run.manifest["data"] and not run.manifest["data"]["demo"]:
        os.environ.setdefault("TRACE_REASONING", run.manifest["data"]["reasoning"])
    data.check(root, run.tasks)
    found = data.data_fingerprint(root, run.tasks)
    changed = [task for task in expected if found[task] != expected[task]]
    if changed:
        raise RunError(f"{root} holds other data than the run began with, in: {', '.join(changed)}.")
    os.environ["TRACE_DATA"] = str(root)


def _batches(names: list[str], tasks: dict[str, Any], limit: int | None) -> list[list[str]]:
    batches: list[list[str]] = []
    size = 0
    for name in names:
        rows = min(len(tasks[name].eval_docs), limit or 10**9)
        if not batches or size + rows > BATCH:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size += rows
    return batches


def _evaluate_cells(
    lm: Any, stage: Stage, tasks: dict[str, Any], settings: dict[str, Any], engine_args: dict[str, Any]
) -> None:
    import lm_eval

    checkpoint = checkpoint_fingerprint(stage)  # reads all weights of a checkpoint from elsewhere: once, not per cell
    started = time.perf_counter()
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks.values()),
        num_fewshot=settings["num_fewshot"],
        limit=settings["test_rows"],
        gen_kwargs=None,
        apply_chat_template=settings["chat_template"],
        bootstrap_iters=0,
        log_samples=True,
        task_manager=data.task_manager(),  # else lm-eval indexes its 10,000 tasks on every call
    )
    seconds = time.perf_counter() - started
    for name, task in tasks.items():
        rows = sorted(results["samples"][name], key=lambda r: r["doc_id"])
        metrics = list(task.aggregation())
        write_jsonl(stage.samples_file(name), (_sample(r, metrics) for r in rows))
        write_json(
            stage.eval_file(name),
            {
                "stage": stage.name,
                "task": name,
                "version": task.VERSION,
                "n": len(rows),
                "headline": metrics[0],
                "metrics": {
                    m: {
                        "value": results["results"][name][f"{m},none"],
                        "stderr": _stderr([r[m] for r in rows]),
                    }
                    for m in metrics
                },
                "checkpoint": checkpoint,
                "settings": settings,
                # On record, but free to differ between cells: most of it is memory and speed.
                "engine_args": engine_args,
                # Tasks that were generated together share their time by rows.
                "seconds": round(seconds * len(rows) / sum(len(s) for s in results["samples"].values()), 3),
            },
        )


def _sample(row: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
    return {
        "doc_id": row["doc_id"],
        "prompt": row["arguments"][0][0],
        "target": row["target"],
        "response": row["filtered_resps"][0],
        **{m: row[m] for m in metrics},
    }


def _stderr(values: list[float]) -> float | None:
    """Standard error of the mean; None for a single row."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5


def external_run(
    path: str | Path,
    checkpoints: dict[str, str],
    *,
    model: str,
    tasks: list[str],
    settings: dict[str, Any],
    data_path: str | None = None,
) -> Run:
    """Makes a run of checkpoints that were trained elsewhere.

    Args:
        path: The run directory.
        checkpoints: Name -> folder of a PEFT adapter or a full model, in the order of training. A name that is a
            task stands for the stage after that task, and if all do, in order, OP and BWT are defined.
        model: The base model.
        tasks: The columns of the matrix.
        settings: Evaluation settings, as in the config of a run.
        data_path: Where the data is; None takes TRACE_DATA.

    Raises:
        RunError: if a folder holds no checkpoint.
    """
    for name, folder in checkpoints.items():
        files = {p.name for p in Path(folder).glob("*")}
        if not files & {"adapter_config.json", "config.json"}:
            raise RunError(f"--checkpoint {name}={folder}: no adapter (adapter_config.json) or model (config.json).")
        if not any(f.endswith(".safetensors") for f in files):
            raise RunError(f"--checkpoint {name}={folder}: no .safetensors file; other formats are not loaded.")
        if "/" in name or name.startswith("."):
            raise RunError(f"--checkpoint {name}=...: a name becomes a folder; it cannot hold '/' or begin with '.'.")
    root = data.find_data(data_path) if data.needs_data(tasks) else None
    if root is not None:
        os.environ["TRACE_DATA"] = str(root)
        data.check(root, tasks)
    base = models.resolve_model(model)
    return Run.create(
        path,
        {
            "method": "external",
            "model": {"name": model, "path": base, "revision": models.pinned_revision(base)},
            "tasks": tasks,
            "task_versions": {name: task.VERSION for name, task in data.load_tasks(tasks).items()},
            "checkpoints": {name: str(Path(folder).absolute()) for name, folder in checkpoints.items()},
            "data": data.data_record(root, tasks),
            "config": settings,
        },
    )
