"""Measures how costs other than training and generation grow with rows, tasks and runs, and how methods' files grow.

- scoring: every row is scored against the answer of a different row; the sum over the eight tasks.
- report by rows: a run of eight tasks. Report by tasks: runs of ROWS[0] rows. The runs are made, not trained, and have
  samples of all cells.
- report by runs: one command reports and compares runs of eight tasks and FEW rows: first without earlier reports, then
  again with them.
- state: the files that a method leaves for the next stage, and its checkpoint, after each of a few tasks. The bytes of
  the files are from training a tiny model (one step per stage), as multiples of the adapter of `sequential`.

    python -m bench.scale [PART ...]

The figure docs/speed.svg is drawn from the saved results. Dotted lines continue the last step of a method's state.
`tests/test_scale.py` tests that a stage costs the same at T = 30 as at the start.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import ROOT, WORK, command, results, save
from trace_bench.report import drawing
from trace_bench.run import Run
from trace_bench.tasks import load_tasks
from trace_tasks import data
from trace_tasks.data.files import write_json, write_jsonl, write_text

ROWS, TASKS, RUNS = (500, 1000, 5000), (8, 15, 30), (1, 10, 30, 100)
FEW, STAGES = 40, 5
#: Methods that keep files for later stages, or whose checkpoint may grow, and one that does neither.
METHODS = ("sequential", "ewc", "ogd", "der", "inflora", "olora", "inclora", "nlora")
FOLDER = WORK / "scale"
#: A task with four rows, whose answers are letters.
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {rows}, test: {rows}}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
target_delimiter: ""
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def main() -> None:
    """Measures the named parts, or all, saves the numbers of each and draws those that exist."""
    parts = {
        "scoring": scoring,
        "report_by_rows": lambda: {str(n): reporting([made_run(f"rows{n}", 8, n)]) for n in ROWS},
        "report_by_tasks": lambda: {str(n): reporting([made_run(f"tasks{n}", n, ROWS[0])]) for n in TASKS},
        "report_by_runs": lambda: {str(n): [reporting(runs), reporting(runs)] for n in RUNS for runs in [many(n)]},
        "state": lambda: {method: state(method) for method in METHODS},
    }
    shutil.rmtree(FOLDER, ignore_errors=True)
    named = sys.argv[1:] or list(parts)
    for name in (name for name in parts if name in named):
        found = parts[name]()
        before = results().get("scale", {})
        demo = {"demo": data.is_demo(data.find_data())}
        save("scale", demo | {part: before[part] for part in parts if part in before} | {name: found})
        print(f"{name}: {found}", flush=True)
    saved = results()["scale"]
    if saved.keys() >= parts.keys():
        [picture] = drawing.draw({"speed": _curves}, saved)
        write_text(ROOT / "docs" / "speed.svg", picture.svg)


# -------------------------------------------------------------------------------------------------------------- seconds


def scoring() -> dict[str, float]:
    """Seconds to score this many rows of each of the eight tasks."""
    seconds = dict.fromkeys(map(str, ROWS), 0.0)
    for task in load_tasks(list(data.FOLDERS)).values():
        docs = list(task.test_docs())
        for count in ROWS:
            pairs = [(docs[i % len(docs)], docs[(i + 1) % len(docs)]["answer"]) for i in range(count)]
            started = time.perf_counter()
            for doc, answer in pairs:
                task.process_results(doc, [answer])
            seconds[str(count)] += time.perf_counter() - started
    return {count: round(value, 2) for count, value in seconds.items()}


def reporting(runs: list[Path]) -> float:
    """Seconds of `trace-bench report`, including imports."""
    argv = [sys.executable, "-m", "trace_bench", "report", *map(str, runs)]
    return round(command(argv, "scale/report"), 1)


def made_run(name: str, tasks: int, rows: int) -> Path:
    """A run of made scores with the samples of all cells, in which each task is forgotten gradually."""
    rng, names = np.random.default_rng(0), [f"task_{i:02}" for i in range(tasks)]
    manifest: dict[str, Any] = {"method": "sequential", "trains": "lora", "model": {"name": "none"}, "tasks": names}
    manifest |= {"task_versions": {}, "data": {"path": None, "demo": False, "fingerprint": {}}, "config": {}}
    run = Run.create(FOLDER / name, {**manifest, "seed": 0})
    for stage in run.stages:
        weights = f"weights {stage.index}" if stage.index else None
        if stage.index:
            losses = [{"step": k, "loss": 3 * 0.9**k} for k in range(1, 40)]
            numbers = {"rows": rows, "steps": 40, "tokens": 1000, "seconds": 2.0, "losses": losses}
            numbers |= {"peak_memory_bytes": 2**30, "memory_of": "process"}
            write_json(stage.train_file, {"checkpoint": weights, **numbers})
        for i, task in enumerate(names[: stage.index] if stage.index else names):
            chance = 0.9 - 0.5 * (stage.index - i - 1) / tasks if stage.index else 0.2
            right = (rng.random(rows) < chance).astype(float)
            text = {"prompt": "a question " * 20, "target": "the answer", "response": "an answer " * 5}
            write_jsonl(stage.samples_file(task), [{"doc_id": k, **text, "accuracy": x} for k, x in enumerate(right)])
            numbers = {"accuracy": {"value": float(right.mean()), "stderr": None}}
            cell = {"stage": stage.name, "task": task, "n": rows, "headline": "accuracy", "metrics": numbers}
            write_json(
                stage.eval_file(task), {**cell, "checkpoint": weights, "settings": {"backend": "hf"}, "seconds": 1.0}
            )
    return run.path


def many(count: int) -> list[Path]:
    """Makes runs of eight tasks that differ by their seeds."""
    first = made_run(f"{count}-0", 8, FEW)
    manifest = json.loads((first / "manifest.json").read_text())
    folders = [first, *(FOLDER / f"{count}-{seed}" for seed in range(1, count))]
    for seed, folder in enumerate(folders[1:], 1):
        shutil.copytree(first, folder)
        write_json(folder / "manifest.json", {**manifest, "seed": seed})
    return folders


# ---------------------------------------------------------------------------------------------------------------- state


def state(method: str) -> dict[str, list[float]]:
    """Bytes of a method's files and checkpoint after each stage, as multiples of the first adapter of `sequential`."""
    tasks, run = _tasks(FOLDER / "tasks"), FOLDER / method
    argv = [sys.executable, "-m", f"trainers.{method}", "--config", "trainers/configs/quickstart.yaml"]
    argv += ["--model_name_or_path", str(_tiny_model()), "--output_dir", str(run), "--tasks", *tasks]
    argv += ["--max_steps", "1", "--bf16", "false", "--dtype", "float32", "--lora_r", "4"]
    command(argv, f"scale/{method}", {"TRACE_TASKS": str(FOLDER / "tasks"), "TRACE_DATA": ""})
    stages = [run / "stages" / f"{i}_{task}" for i, task in enumerate(tasks, 1)]
    unit = _size(FOLDER / "sequential" / "stages" / f"1_{tasks[0]}" / "adapter")
    return {
        "kept": [round(_size(stage / "method_state") / unit, 3) for stage in stages],
        "checkpoint": [round((_size(stage / "adapter") + _size(stage / "model")) / unit, 3) for stage in stages],
    }


def _tasks(folder: Path) -> list[str]:
    names = [f"letters_{i:02}" for i in range(STAGES)]
    for i, name in enumerate(names):
        rows = folder / f"{name}.jsonl"
        write_jsonl(rows, [{"q": f"task {i} row {k}: ", "a": chr(97 + (i + k) % 26)} for k in range(4)])
        write_text(folder / f"{name}.yaml", YAML.format(name=name, rows=rows))
    return names


def _size(folder: Path) -> int:
    """The bytes of the tensors in the files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _tiny_model() -> Path:
    """Makes a model of two layers with random weights and the quickstart's tokenizer."""
    folder = FOLDER / "tiny"
    if not folder.exists():
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        from trace_bench.engine import models

        tokenizer = AutoTokenizer.from_pretrained(models.resolve_model(models.QUICKSTART))
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------------- figure


def _curves(saved: dict[str, Any]) -> tuple[Any, str]:
    figure, axes = drawing.axes_of(2.9, 1, 4, left=0.45, gap=0.45)
    twice = ("first report of all", "again")
    curves = [
        ("rows a task", {"report of a run": saved["report_by_rows"], "scoring": saved["scoring"]}),
        ("tasks", {"report of a run": saved["report_by_tasks"]}),
        ("runs", {name: {n: both[k] for n, both in saved["report_by_runs"].items()} for k, name in enumerate(twice)}),
    ]
    for panel, (what, lines) in zip(axes, curves, strict=False):
        for (name, points), (colour, marker) in zip(lines.items(), drawing.SERIES, strict=False):
            panel.plot([int(n) for n in points], list(points.values()), color=colour, marker=marker, label=name)
        panel.set_title("seconds")
        panel.set_xlabel(what)
        panel.legend(loc="upper left")
    axes[3].set_title("state, in adapters")
    axes[3].set_xlabel("tasks")
    for (name, sizes), (colour, _) in zip(_that_grow(saved["state"]).items(), drawing.SERIES, strict=False):
        axes[3].plot(range(1, len(sizes) + 1), sizes, color=colour, label=name)
        further = [sizes[-1] + k * (sizes[-1] - sizes[-2]) for k in range(max(TASKS) - len(sizes) + 1)]
        axes[3].plot(range(len(sizes), max(TASKS) + 1), further, color=colour, linestyle="dotted")
    axes[3].legend(loc="upper left")
    axes[3].set_ylim(top=1.7 * axes[3].get_ylim()[1])  # room for the names above the lines
    for panel in axes:
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    return figure, "Cost as it grows."


def _that_grow(state: dict[str, Any]) -> dict[str, list[float]]:
    """The sum of files and checkpoint for methods that grow; methods with equal sums share one entry."""
    same: dict[tuple[float, ...], list[str]] = {}
    for method, parts in state.items():
        sizes = tuple(a + b for a, b in zip(parts["kept"], parts["checkpoint"], strict=True))
        if max(sizes) > 1.1:
            same.setdefault(sizes, []).append(method)
    return {", ".join(methods): list(sizes) for sizes, methods in same.items()}


if __name__ == "__main__":
    main()
