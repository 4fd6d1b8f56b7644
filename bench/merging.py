"""Measures how much of an adapter survives merging into bf16: rounded to nearest, and without a bias (`models.merge`).

The measure is the log-likelihood of one task's training answers. The adapter is one of `bench.evaluation`'s run, with
its update made smaller: a tenth is about what a learning rate of 1e-4 gives. All models compute in float32, so only the
weights differ. The command prints the remaining share of the adapter's gain over the base model.

    make bench PART=merging
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench.common import WORK, save
from bench.evaluation import trained
from bench.training import loss_of
from trace_bench.report import Table, markdown
from trace_bench.tasks import load_tasks, training_rows

TASK = "trace_py150"
ROWS, PROMPT, ANSWER = 12, 256, 128
SIZES = (1.0, 0.3, 0.1, 0.03)


def main() -> None:
    """Measures every size and saves the result."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from trace_bench.engine import models
    from trace_bench.run import Run
    from trace_tasks.tokens import example_ids

    run = Run.open(trained())
    base = models.resolve_model(run.manifest["model"]["name"])
    adapter = next(stage.checkpoint for stage in run.stages if stage.task == TASK)
    rows = training_rows(load_tasks([TASK])[TASK], ROWS)
    examples = example_ids(models.load_tokenizer(base), *zip(*rows, strict=True), PROMPT, ANSWER)

    def load(dtype: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)

    def likelihood(model: Any) -> float:
        return -loss_of(model, examples, autocast=False)

    before = likelihood(load(torch.float32))
    result: dict[str, Any] = {"task": TASK, "rows": ROWS, "log_likelihood_of_the_base": round(before, 4), "sizes": {}}
    for size in SIZES:
        folder = _scaled(adapter, size)
        gain = likelihood(PeftModel.from_pretrained(load(torch.float32), folder)) - before
        nearest = PeftModel.from_pretrained(load(torch.bfloat16), folder).merge_and_unload().float()
        unbiased, lost = models.merge(load(torch.bfloat16), folder)
        result["sizes"][size] = {
            "gain_nats_per_token": round(gain, 4),
            "left_to_the_nearest": round((likelihood(nearest) - before) / gain, 4),
            "left_without_a_bias": round((likelihood(unbiased.float()) - before) / gain, 4),
            "lost_along_the_update": round(lost, 5),
        }
    save("merging", result)
    head = ["size of the update", "gain, nats a token", "left: nearest", "left: without a bias"]
    print(markdown(Table(head, [[size, *list(found.values())[:3]] for size, found in result["sizes"].items()])))


def _scaled(adapter: Path, size: float) -> Path:
    """A copy of an adapter with a smaller update."""
    from safetensors.torch import load_file, save_file

    folder = WORK / "merging" / str(size)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: size * t if "lora_B" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder


if __name__ == "__main__":
    main()
