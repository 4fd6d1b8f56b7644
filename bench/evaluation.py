"""A whole evaluation, stages x seen tasks: ours against what people would use instead.

Contenders, on the same nine checkpoints (the base model and eight adapters), rows, prompts and lengths:

- ours: `trace-bench evaluate`, one engine for all stages.
- lm-eval vllm: `lm_eval run --model vllm` once per stage on the merged model; merging is not counted.
- lm-eval hf: `lm_eval run --model hf,peft=ADAPTER` once per stage, batch 16. Its `--batch_size auto` tries batches of
  the full context length, which needs more memory than a small machine has.
- official: transformers' generate in batches of 4 (all rows of a cell: larger ones would change nothing), the model
  loaded anew for each stage (`bench/official.py`).

The engine's settings of ours (`trace_bench.engine.prepare_vllm`) are given to lm-eval too: without them it would take
longer still. Of ours: the tokens a second, the share of the time that the engine is at work, and what a stage costs
besides (swapping weights, scoring, files).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.common import ROOT, WORK, command, save
from trace_bench.report import Table, markdown
from trace_bench.run import read_jsonl
from trace_bench.tasks import load_tasks

ROWS = 4
BATCH = 4
PROMPT, ANSWER, CONTEXT = 960, 64, 1024
ENGINE = {"max_model_len": CONTEXT, "dtype": "bfloat16"}
VLLM_ENV = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_LOGGING_LEVEL": "WARNING"}


def main() -> None:
    """Prepares the checkpoints, times every contender, compares their answers, and saves the result."""
    from trace_bench.engine import models
    from trace_bench.run import Run

    run = Run.open(trained())
    base = models.resolve_model(run.manifest["model"]["name"])
    tasks = load_tasks(run.tasks)
    stubs = _stubs(tasks)
    seen = [run.tasks[: stage.index or None] for stage in run.stages]
    lm_eval = str(Path(sys.executable).with_name("lm_eval"))
    seconds: dict[str, list[float]] = {}
    answers: dict[str, dict[tuple[int, str], list[str]]] = {}

    copy = WORK / "evaluation" / "ours"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run.path, copy)
    # The others read no likelihoods either.
    evaluate = [sys.executable, "-m", "trace_bench.cli", "evaluate", str(copy), "--no-likelihood"]
    seconds["ours"] = [command(evaluate, "evaluation/ours")]
    log = (WORK / "evaluation" / "ours.log").read_text().replace(",", "")
    (numbers,) = re.findall(
        r"in (\d+) s \(engine start (\d+) s engine at work (\d+) s: (\d+) tokens read (\d+) written (\d+) a second", log
    )
    whole, start, work, read, written, rate = map(int, numbers)
    ours = Run.open(copy)
    answers["ours"] = {
        (s.index, t): [row["response"] for row in read_jsonl(s.samples_file(t))]
        for s, names in zip(ours.stages, seen, strict=True)
        for t in names
    }

    for stage, names in zip(run.stages, seen, strict=True):
        merged = WORK / "evaluation" / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        models.load_merged(base, stage.checkpoint, dtype="auto").save_pretrained(merged)
        for file in Path(base).glob("*token*"):
            shutil.copy(file, merged)
        peft = f",peft={stage.checkpoint}" if stage.checkpoint else ""
        wanted = ",".join(f"bench_{name}" for name in names)
        common = ["--tasks", wanted, "--include_path", str(stubs), "--limit", str(ROWS), "--log_samples"]
        for name, model, arguments in (
            (
                "lm-eval vllm",
                "vllm",
                f"pretrained={merged},max_model_len={CONTEXT},dtype=bfloat16,enforce_eager=True,"
                "enable_prefix_caching=True",
            ),
            ("lm-eval hf", "hf", f"pretrained={base},max_length={CONTEXT},dtype=bfloat16{peft}"),
        ):
            out = WORK / "evaluation" / name.replace(" ", "-") / str(stage.index)
            shutil.rmtree(out, ignore_errors=True)
            device = ["--device", "cpu", "--batch_size", "16"] if model == "hf" else []
            argv = [lm_eval, "run", "--model", model, "--model_args", arguments, *common, *device]
            seconds.setdefault(name, []).append(
                command([*argv, "--output_path", str(out)], f"evaluation/{out.parent.name}-{stage.index}", VLLM_ENV)
            )
            for task in names:
                (file,) = out.rglob(f"samples_bench_{task}_*.jsonl")
                rows = sorted(read_jsonl(file), key=lambda row: row["doc_id"])
                answers.setdefault(name, {})[stage.index, task] = [row["filtered_resps"][0] for row in rows]
        out = WORK / "evaluation" / f"official-{stage.index}.json"
        argv = [sys.executable, "-m", "bench.official", base, str(stage.checkpoint or ""), str(BATCH), str(out)]
        argv += [str(ROWS), str(PROMPT), str(ANSWER), *names]
        seconds.setdefault("official", []).append(command(argv, f"evaluation/{out.stem}"))
        for task, texts in json.loads(out.read_text()).items():
            answers.setdefault("official", {})[stage.index, task] = texts
        print(f"stage {stage.index}: " + ", ".join(f"{k} {v[-1]:.0f} s" for k, v in seconds.items() if k != "ours"))

    docs = {name: list(task.test_docs())[:ROWS] for name, task in tasks.items()}
    scores = {
        name: [
            sum(
                tasks[task].process_results(doc, [text])[headline(tasks[task])]
                for doc, text in zip(docs[task], texts, strict=True)
            )
            / len(texts)
            for (_, task), texts in cells.items()
        ]
        for name, cells in answers.items()
    }
    total = sum(map(len, answers["ours"].values()))
    result: dict[str, Any] = {"rows_per_cell": ROWS, "cells": len(answers["ours"]), "stages": len(seen)}
    result["contenders"] = {
        name: {
            "seconds": round(sum(times), 1),
            "per_stage": [round(t, 1) for t in times] if name != "ours" else None,
            "ratio": round(sum(times) / sum(seconds["ours"]), 2),
            "mean_of_the_cells": round(100 * sum(scores[name]) / len(scores[name]), 2),
            "rows_that_differ_from_ours": sum(
                _scored(a) != _scored(b)
                for cell, texts in answers["ours"].items()
                for a, b in zip(texts, answers[name][cell], strict=True)
            ),
        }
        for name, times in seconds.items()
    }
    result["rows"] = total
    result["ours"] = {
        "tokens_read": read,
        "tokens_written": written,
        "tokens_per_second": rate,
        "engine_start_seconds": start,
        "share_of_time_in_the_engine": round(work / seconds["ours"][0], 2),
        "seconds_per_stage_besides": round((whole - start - work) / len(seen), 2),
    }
    save("evaluation", result)
    print(result["ours"])
    print(
        markdown(
            Table(
                [
                    "9 stages, 44 cells",
                    "seconds",
                    "ours is faster by",
                    "mean score",
                    f"answers that differ (of {total})",
                ],
                [
                    [name, c["seconds"], f"{c['ratio']}x", c["mean_of_the_cells"], c["rows_that_differ_from_ours"]]
                    for name, c in result["contenders"].items()
                ],
            )
        )
    )


def trained() -> Path:
    """The run whose checkpoints are evaluated: eight stages, a few steps each."""
    path = WORK / "evaluation" / "run"
    limits = ["--max_prompt_length", PROMPT, "--max_new_tokens", ANSWER, "--train_rows", 16, "--test_rows", ROWS]
    argv = [sys.executable, "-m", "trainers.sequential", "--config", "trainers/configs/quickstart_real.yaml"]
    argv += ["--output_dir", str(path), *map(str, limits), "--engine_args", json.dumps(ENGINE)]
    command(argv, "evaluation/training")
    return path


def _stubs(tasks: dict[str, Any]) -> Path:
    """The tasks for plain lm-eval, with the lengths of the run: lm-eval has no option that only lowers them."""
    folder = WORK / "evaluation" / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        kwargs = dict(task.config.generation_kwargs)
        kwargs["max_gen_toks"] = min(kwargs["max_gen_toks"], ANSWER)
        source = ROOT / "trace_tasks" / f"{name}.yaml"
        text = f"include: {source}\ntask: bench_{name}\ngeneration_kwargs: {json.dumps(kwargs)}\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


def headline(task: Any) -> str:
    """The metric that a cell of the matrix holds."""
    return next(iter(task.aggregation()))


def _scored(text: str) -> str:
    # The official way strips special tokens and keeps what follows; white space at the ends says nothing.
    return text.strip()


if __name__ == "__main__":
    main()
