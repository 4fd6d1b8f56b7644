"""Measures the effect of three deviations from the official code, for docs/deviations.md.

Optimizer: two demo tasks are trained in sequence for each of SEEDS, once with new moments for each stage (ours), once
with moments that carry over. GEM: the official code compares with the last gradient of each earlier task's training,
separately for each parameter. LwF: the official code swaps the arguments of the divergence. For GEM and LwF the
gradients on the checkpoints of the first run are compared.

    make bench PART=deviations
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from bench.common import ROOT, WORK, command, save
from trace_bench.tasks import load_tasks, training_rows

TASKS = ("trace_fomc", "trace_scienceqa")
SEEDS = (0, 1)
ROWS, TEST_ROWS, EPOCHS, TEMPERATURE = 48, 24, 2, 2.0
METHODS = {"new for each stage": ["-m", "trainers.sequential"], "carried over": [str(ROOT / "bench" / "carried.py")]}


def trained(method: str, seed: int) -> Path:
    """Trains and evaluates a run, and returns its folder."""
    path = WORK / "deviations" / f"{method.replace(' ', '_')}-{seed}"
    shutil.rmtree(path, ignore_errors=True)
    argv = [sys.executable, *METHODS[method], "--config", "trainers/configs/quickstart.yaml", "--data", "demo"]
    argv += ["--output_dir", str(path), "--tasks", *TASKS, "--seed", str(seed), "--max_new_tokens", "16"]
    argv += ["--train_rows", str(ROWS), "--test_rows", str(TEST_ROWS), "--num_train_epochs", str(EPOCHS)]
    command(argv, f"deviations/{path.name}", {"PYTHONPATH": str(ROOT)})
    command([sys.executable, "-m", "trace_bench", "evaluate", str(path)], f"deviations/{path.name}-evaluation")
    return path


def gradients(path: Path) -> dict[str, Any]:
    """Compares the gradients that GEM and LwF use here with those of the official code."""
    import torch
    from peft import PeftModel
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM

    from trace_bench.engine import models
    from trace_bench.run import Run
    from trace_tasks.tokens import example_ids

    run = Run.open(path)
    base = models.resolve_model(run.manifest["model"]["name"])
    tokenizer = models.load_tokenizer(base)

    def load(stage: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, run.stages[stage].checkpoint, is_trainable=True).eval()

    def examples(task: str) -> list[Any]:
        rows = training_rows(load_tasks([task])[task], 16)
        return list(example_ids(tokenizer, *zip(*rows, strict=True), 512, 128))

    def logits(model: Any, example: Any) -> Any:
        answer = sum(label != -100 for label in example["labels"])
        return model(torch.tensor([example["input_ids"]])).logits[0, -answer - 1 : -1]

    def gradient(model: Any, losses: Any) -> dict[str, Any]:
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return {n: p.grad.flatten().clone() for n, p in model.named_parameters() if p.requires_grad}

    def log_likelihood(model: Any, found: list[Any]) -> Any:
        for example in found:
            wanted = torch.tensor([label for label in example["labels"] if label != -100])
            yield -log_softmax(logits(model, example), -1).gather(1, wanted[:, None]).mean() / len(found)

    def joined(found: dict[str, Any]) -> Any:
        return torch.cat(list(found.values()))

    def cosine(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float(torch.cosine_similarity(joined(a), joined(b), dim=0))

    earlier, later = (examples(task) for task in TASKS)
    teacher, student = load(1), load(2)
    stale, present = (gradient(model, log_likelihood(model, earlier)) for model in (teacher, student))
    new = gradient(student, log_likelihood(student, later))
    against = [float(new[name] @ present[name]) < 0 for name in new]

    def divergences(exchanged: bool) -> Any:
        for example in later:
            with torch.no_grad():
                wanted = log_softmax(logits(teacher, example) / TEMPERATURE, -1)
            said = log_softmax(logits(student, example) / TEMPERATURE, -1)
            pair = (wanted, said) if exchanged else (said, wanted)
            yield kl_div(*pair, log_target=True, reduction="batchmean") / len(later)

    ours, official = gradient(student, divergences(False)), gradient(student, divergences(True))
    return {
        "gem_cosine_of_last_and_present_gradient": round(cosine(stale, present), 3),
        "gem_cosine_of_new_task_and_memory": round(cosine(new, present), 3),
        "gem_share_of_parameters_that_conflict": round(sum(against) / len(against), 3),
        "lwf_cosine_of_both_divergences": round(cosine(ours, official), 3),
        "lwf_length_official_over_ours": round(float(joined(official).norm() / joined(ours).norm()), 3),
    }


def main() -> None:
    """Trains, compares and saves."""
    import numpy as np

    from trace_bench.run import Run, read_json

    scores: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for seed in SEEDS:
        for method in METHODS:
            path = trained(method, seed)
            last = Run.open(path).stages[-1]
            cells = [read_json(last.path / "eval" / f"{task}.json") for task in TASKS]
            scores[method].append([round(100 * cell["metrics"][cell["headline"]]["value"], 1) for cell in cells])
            print(method, seed, scores[method][-1], flush=True)
    result = {"optimizer": {m: {"final": s, "mean": np.mean(s, 0).round(1).tolist()} for m, s in scores.items()}}
    result |= gradients(WORK / "deviations" / f"{next(iter(METHODS)).replace(' ', '_')}-{SEEDS[0]}")
    save("deviations", {"tasks": TASKS, "rows": ROWS, "epochs": EPOCHS, **result})
    print(result)


if __name__ == "__main__":
    main()
