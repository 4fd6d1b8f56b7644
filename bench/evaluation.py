"""Times a whole evaluation (stages x seen tasks, few and many rows per cell): ours against what people use instead.

    make bench PART=evaluation
    python -m bench.evaluation --rows 40 --contenders official

Contenders, on the same nine checkpoints (the base model and eight adapters), rows, prompts and lengths:

- ours: `trace-bench evaluate`, one engine for all stages. It is always measured.
- lm-eval-vllm: `lm_eval run --model vllm` once per stage on the merged model; merging is not counted.
- lm-eval-hf: `lm_eval run --model hf,peft=ADAPTER` once per stage, batch 16. Its `--batch_size auto` tries batches of
  the full context length, which needs more memory than a small machine has. It is measured only if it is chosen.
- official: transformers' generate in batches of 4; the model is loaded again for each stage (`bench/official.py`).

lm-eval gets our settings of the engine (`trace_bench.engine.prepare_vllm`), too: without them it would be even slower.
For ours the result also has the tokens per second, the share of the time in which the engine works, and the other costs
of a stage (swapping weights, scoring, files).

results.json has a part for each number of rows, with the contenders that were chosen.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.common import ROOT, WORK, command, results, save
from trace_bench.report import Table, markdown
from trace_bench.run import Run, Stage, read_jsonl
from trace_bench.tasks import load_tasks

ROWS = 4
BATCH = 4
PROMPT, ANSWER, CONTEXT = 960, 64, 1024
ENGINE = {"max_model_len": CONTEXT, "dtype": "bfloat16"}
VLLM_ENV = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_LOGGING_LEVEL": "WARNING"}
CONTENDERS = ("lm-eval-vllm", "lm-eval-hf", "official")
#: (stage, task) -> answers.
Answers = dict[tuple[int, str], list[str]]


def main() -> None:
    """Prepares the checkpoints, times the contenders for each number of rows, and prints the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="+", type=int, default=[ROWS, 40], help="test rows per cell")
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=["lm-eval-vllm", "official"])
    args = parser.parse_args()
    run = Run.open(trained())
    tasks = load_tasks(run.tasks)
    for rows in args.rows:
        measure(run, tasks, rows, args.contenders)
    show()


def measure(run: Run, tasks: dict[str, Any], rows: int, contenders: list[str]) -> None:
    """Times ours and the contenders with this number of rows per cell, compares their answers, and saves the result."""
    seen = {stage: run.tasks[: stage.index or None] for stage in run.stages}
    part = f"evaluation_{rows}_rows"
    result: dict[str, Any] = {"rows_per_cell": rows, "cells": sum(map(len, seen.values())), "stages": len(seen)}
    taken, answers, result["ours"] = ours(run, seen, rows)
    docs = {name: list(task.test_docs())[:rows] for name, task in tasks.items()}
    result["rows"] = sum(map(len, answers.values()))
    found = {"ours": _contender([taken], answers, answers, tasks, docs)}
    if contenders:
        for name, (seconds, texts) in others(run, seen, _stubs(tasks), rows, contenders).items():
            found[name] = _contender(seconds, texts, answers, tasks, docs)
    for one in found.values():
        one["ratio"] = round(one["seconds"] / found["ours"]["seconds"], 2)
    save(part, {**result, "contenders": found})


def ours(run: Run, seen: dict[Stage, list[str]], rows: int) -> tuple[float, Answers, dict[str, Any]]:
    """Seconds and answers of `trace-bench evaluate`, and how the time is divided."""
    log, folder = f"evaluation/ours-{rows}", WORK / "evaluation" / f"ours-{rows}"
    shutil.rmtree(folder, ignore_errors=True)
    argv = [sys.executable, "-m", "trace_bench", "evaluate", str(folder), "--model", run.manifest["model"]["name"]]
    for stage in run.stages[1:]:
        argv += ["--checkpoint", f"{stage.task}={stage.checkpoint}"]
    limits = {"--test-rows": rows, "--max-prompt-length": PROMPT, "--max-new-tokens": ANSWER}
    argv += ["--tasks", *run.tasks, *(str(word) for pair in limits.items() for word in pair)]
    # The contenders compute no likelihoods, so ours does not either.
    seconds = command([*argv, "--engine-args", json.dumps(ENGINE), "--no-likelihood"], log)
    numbers = re.search(
        r"in (\d+) s \(engine start (\d+) s engine work (\d+) s: (\d+) tokens read (\d+) written (\d+) tokens/s",
        (WORK / f"{log}.log").read_text().replace(",", ""),
    )
    assert numbers is not None
    whole, start, work, read, written, rate = map(int, numbers.groups())
    answers = {
        (stage.index, task): [row["response"] for row in read_jsonl(stage.samples_file(task))]
        for stage, names in zip(Run.open(folder).stages, seen.values(), strict=True)
        for task in names
    }
    return (
        seconds,
        answers,
        {
            "tokens_read": read,
            "tokens_written": written,
            "tokens_per_second": rate,
            "engine_start_seconds": start,
            "share_of_time_in_the_engine": round(work / seconds, 2),
            "seconds_per_stage_besides": round((whole - start - work) / len(seen), 2),
        },
    )


def others(
    run: Run, seen: dict[Stage, list[str]], stubs: Path, rows: int, contenders: list[str]
) -> dict[str, tuple[list[float], Answers]]:
    """Contender -> the seconds of each stage, and the answers."""
    from trace_bench.engine import models

    base = models.resolve_model(run.manifest["model"]["name"])
    found: dict[str, tuple[list[float], Answers]] = {name: ([], {}) for name in contenders}
    for stage, names in seen.items():
        for name in contenders:
            out = WORK / "evaluation" / f"{name}-{rows}" / str(stage.index)
            shutil.rmtree(out, ignore_errors=True)
            log = f"evaluation/{name}-{rows}-{stage.index}"
            if name == "official":
                out = out.with_suffix(".json")
                out.parent.mkdir(parents=True, exist_ok=True)
                argv = [sys.executable, "-m", "bench.official", base, str(stage.checkpoint or ""), str(BATCH), str(out)]
                found[name][0].append(command([*argv, *map(str, (rows, PROMPT, ANSWER)), *names], log))
                texts = json.loads(out.read_text())
            else:
                found[name][0].append(command(_lm_eval(name, base, stage, names, stubs, rows, out), log, VLLM_ENV))
                texts = {}
                for task in names:
                    (file,) = out.rglob(f"samples_bench_{task}_*.jsonl")
                    samples = sorted(read_jsonl(file), key=lambda row: row["doc_id"])
                    texts[task] = [row["filtered_resps"][0] for row in samples]
            found[name][1].update({(stage.index, task): texts[task] for task in names})
        said = ", ".join(f"{name} {seconds[-1]:.0f} s" for name, (seconds, _) in found.items())
        print(f"{rows} rows, stage {stage.index}: {said}", flush=True)
    return found


def _lm_eval(name: str, base: str, stage: Stage, names: list[str], stubs: Path, rows: int, out: Path) -> list[str]:
    """lm-eval's command for a stage. For vLLM the adapter is merged first, which is not timed."""
    from trace_bench.engine import models

    argv = [str(Path(sys.executable).with_name("lm_eval")), "run", "--include_path", str(stubs), "--log_samples"]
    argv += ["--limit", str(rows), "--output_path", str(out), "--tasks", ",".join(f"bench_{task}" for task in names)]
    if name == "lm-eval-hf":
        peft = f",peft={stage.checkpoint}" if stage.checkpoint else ""
        arguments = f"pretrained={base},max_length={CONTEXT},dtype=bfloat16{peft}"
        return [*argv, "--model", "hf", "--model_args", arguments, "--device", "cpu", "--batch_size", "16"]
    merged = WORK / "evaluation" / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    model = models.load_model(base, None, dtype="auto")
    if stage.checkpoint is not None:
        model, _ = models.merge(model, stage.checkpoint)
    model.save_pretrained(merged)
    for file in Path(base).glob("*token*"):
        shutil.copy(file, merged)
    arguments = f"pretrained={merged},max_model_len={CONTEXT},dtype=bfloat16"
    return [*argv, "--model", "vllm", "--model_args", f"{arguments},enforce_eager=True,enable_prefix_caching=True"]


def _contender(
    seconds: list[float], texts: Answers, of_ours: Answers, tasks: dict[str, Any], docs: dict[str, list[Any]]
) -> dict[str, Any]:
    """The saved result of a contender, without its ratio to ours."""
    scores = [score(tasks[task], docs[task], answers) for (_, task), answers in texts.items()]
    return {
        "seconds": round(sum(seconds), 1),
        "per_stage": [round(t, 1) for t in seconds] if len(seconds) > 1 else None,
        "mean_of_the_cells": round(100 * sum(scores) / len(scores), 2),
        "rows_that_differ_from_ours": sum(
            # The official way removes special tokens and keeps the text after them: the ends do not matter.
            a.strip() != b.strip()
            for cell, answers in of_ours.items()
            for a, b in zip(answers, texts[cell], strict=True)
        ),
    }


def show() -> None:
    """Prints one table for all numbers of rows."""
    found = {part["rows_per_cell"]: part for name, part in results().items() if name.startswith("evaluation_")}
    lines = []
    for name in ("ours", *CONTENDERS):
        line: list[Any] = [name]
        for _, part in sorted(found.items()):
            one = part["contenders"].get(name)
            line += [one["seconds"], f"{one['ratio']}x", one["mean_of_the_cells"]] if one else ["", "", ""]
        lines.append(line)
    head = [f"{what}, {rows} rows" for rows in sorted(found) for what in ("s", "ours is faster by", "mean score")]
    print(markdown(Table(["evaluation", *head], lines)))
    for rows, part in sorted(found.items()):
        print(f"{rows} rows, {part['machine']['cpu']}, {part['date']}: {part['ours']}")


def trained() -> Path:
    """The run whose checkpoints are evaluated: eight stages of a few steps. Its own test rows are not used here."""
    path = WORK / "evaluation" / "run"
    limits = ["--max_prompt_length", PROMPT, "--max_new_tokens", ANSWER, "--train_rows", 16, "--test_rows", ROWS]
    argv = [sys.executable, "-m", "trainers.sequential", "--config", "trainers/configs/quickstart_real.yaml"]
    argv += ["--output_dir", str(path), *map(str, limits), "--engine_args", json.dumps(ENGINE)]
    command(argv, "evaluation/training")
    return path


def _stubs(tasks: dict[str, Any]) -> Path:
    """The tasks for plain lm-eval, with the run's lengths: no option of lm-eval can only lower the lengths."""
    folder = WORK / "evaluation" / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        kwargs = dict(task.config.generation_kwargs)
        kwargs["max_gen_toks"] = min(kwargs["max_gen_toks"], ANSWER)
        source = ROOT / "trace_tasks" / f"{name}.yaml"
        text = f"include: {source}\ntask: bench_{name}\ngeneration_kwargs: {json.dumps(kwargs)}\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


def score(task: Any, docs: list[Any], answers: list[str]) -> float:
    """The number in a cell of the matrix: the mean of the task's first metric."""
    metric = next(iter(task.aggregation()))
    scored = [task.process_results(doc, [text])[metric] for doc, text in zip(docs, answers, strict=True)]
    return sum(scored) / len(scored)


if __name__ == "__main__":
    main()
