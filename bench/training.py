"""Times the training of one stage: ours against TRL's defaults and a plain transformers loop, on the same rows.

The rows have the real mix of lengths: all eight tasks together, cut at PROMPT and ANSWER tokens. The contenders take
turns, ROUNDS times, each in its own process. All have LoRA on all linear layers, AdamW, bf16, and the same token ids,
epochs, batch and learning rate:

- ours: `trainers.base.CLTrainer` with the settings of the quickstart configs and the loss of the others.
- TRL: `trl.SFTTrainer` with SFTConfig's defaults, which include gradient checkpointing.
- plain: `transformers.Trainer` on rows padded to the longest of a batch, float32 weights under bf16 autocast (on a CPU
  the checkpoint's bf16 weights are even slower).

The compared loss is that of the trained model on all rows, computed by one function for all. `bf16 share` is the
operations per second as a share of the matmul rate, which is measured in the same process. The operations are those of
linear layers and attention, forward and backward (no weight gradients of frozen weights). Ours is trained once more
under torch's profiler, which shows where the rest of the time goes.

A CPU with AMX has a very different matmul rate. Its results are kept in addition to those of a CPU without.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.common import WORK, command, save
from trace_bench.report import Table, markdown
from trace_bench.tasks import load_tasks, training_rows
from trace_tasks.tokens import example_ids

ROUNDS = 3
CONTENDERS = ("ours", "TRL", "plain")
ROWS, EPOCHS, BATCH, LEARNING_RATE = 3, 1, 8, 5e-4
PROMPT, ANSWER = 768, 256
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FOLDER = WORK / "training"


def main() -> None:
    """Times the contenders in turn and saves medians and ratios."""
    if len(sys.argv) == 3:
        return _one(sys.argv[1], Path(sys.argv[2]))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for i in range(ROUNDS):
        for name in CONTENDERS[i % 3 :] + CONTENDERS[: i % 3]:
            FOLDER.mkdir(parents=True, exist_ok=True)
            out = FOLDER / f"{name}-{i}.json"
            command([sys.executable, "-m", "bench.training", name, str(out)], f"training/{name}-{i}")
            found[name].append(json.loads(out.read_text()))
            print(f"round {i + 1}: {name}: {found[name][-1]}", flush=True)
    rate = {name: median(r["tokens_per_second"] for r in runs) for name, runs in found.items()}
    result = {
        name: {
            "tokens_per_second": round(rate[name], 1),
            "all": [round(r["tokens_per_second"], 1) for r in found[name]],
            "ours_is_faster_by": round(rate["ours"] / rate[name], 2),
            "loss_before": found[name][0]["loss_before"],
            "loss_after": round(median(r["loss_after"] for r in found[name]), 4),
            "bf16_share": round(median(r["bf16_share"] for r in found[name]), 3),
            "peak_memory_gib": round(median(r["peak_memory_gib"] for r in found[name]), 2),
        }
        for name in CONTENDERS
    }
    first = found["ours"][0]
    shares = {kind: round(median(r["profile"][kind] for r in found["ours"]), 3) for kind in first["profile"]}
    amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    save(
        "training_amx" if amx else "training",
        {"rows": first["rows"], "tokens": first["tokens"], "contenders": result, "profile": shares},
    )
    print(f"ours by torch's profiler: {shares}")
    print(
        markdown(
            Table(
                ["training", "tokens/s", "ours is faster by", "loss", "bf16 share", "GiB"],
                [
                    [
                        name,
                        r["tokens_per_second"],
                        f"{r['ours_is_faster_by']}x",
                        f"{r['loss_before']} -> {r['loss_after']}",
                        f"{100 * r['bf16_share']:.0f} %",
                        r["peak_memory_gib"],
                    ]
                    for name, r in result.items()
                ],
            )
        )
    )


def _one(name: str, out: Path) -> None:
    import resource

    import torch
    from transformers import AutoTokenizer

    from trace_bench.engine import models
    from trace_tasks import data

    torch.manual_seed(0)
    base = models.resolve_model(models.QUICKSTART)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tasks = load_tasks(list(data.FOLDERS)).values()
    rows = [row for task in tasks for row in training_rows(task, ROWS)]
    examples = example_ids(tokenizer, *zip(*rows, strict=True), PROMPT, ANSWER)
    trainer = {"ours": _ours, "TRL": _trl, "plain": _plain}[name](base, tokenizer, examples)
    before = loss_of(trainer.model, examples)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    tokens = EPOCHS * sum(len(e["input_ids"]) for e in examples)
    after = loss_of(trainer.model, examples)
    out.write_text(
        json.dumps(
            {
                "rows": len(rows),
                "tokens": tokens,
                "seconds": round(seconds, 2),
                "tokens_per_second": tokens / seconds,
                "loss_before": round(before, 4),
                "loss_after": round(after, 4),
                "bf16_share": EPOCHS * operations(trainer.model, examples) / seconds / _matmul_rate(),
                "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "profile": _profile(trainer) if name == "ours" else None,
            }
        )
    )


def _profile(trainer: Any) -> dict[str, float]:
    """Trains once more and returns the operations' shares of the time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.train()
    shares = {"matrix products": 0.0, "attention": 0.0, "other": 0.0}
    for operation in profiler.key_averages():
        name = str(operation.key)
        kind = "attention" if "scaled_dot_product" in name else "matrix products" if name in PRODUCTS else "other"
        shares[kind] += operation.self_cpu_time_total
    return {kind: microseconds / sum(shares.values()) for kind, microseconds in shares.items()}


def _ours(base: str, tokenizer: Any, examples: Any) -> Any:
    import tempfile

    from datasets import Dataset
    from trl import ModelConfig

    from trace_bench.run import Run
    from trainers.base import CLConfig, CLTrainer

    class Mixed(CLTrainer):
        def stage_dataset(self, stage: Any) -> Dataset:
            return Dataset.from_list(examples)

    folder = tempfile.mkdtemp(dir=FOLDER)
    config = CLConfig(
        output_dir=folder,
        tasks=["trace_fomc"],
        learning_rate=LEARNING_RATE,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        bf16=True,
        gradient_checkpointing=False,
        train_sampling_strategy="group_by_length",
        loss_weights="tokens",  # as in the other contenders
        max_prompt_length=PROMPT,
        max_answer_length=ANSWER,
        disable_tqdm=True,
    )
    model = ModelConfig(
        model_name_or_path=base, use_peft=True, lora_r=16, lora_alpha=32, lora_dropout=0.0, lora_target_modules=MODULES
    )
    manifest = {"model": {"name": base}, "tasks": ["trace_fomc"], "config": {}}
    run = Run.create(folder + "/run", manifest)
    return Mixed(config, model, run, run.stages[1], tokenizer)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=MODULES, task_type="CAUSAL_LM")


def _settings() -> dict[str, Any]:
    """The settings that all trainings share."""
    import torch

    return {
        "output_dir": str(FOLDER),
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "constant",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _trl(base: str, tokenizer: Any, examples: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**_settings(), max_length=PROMPT + ANSWER)
    rows = Dataset.from_list(examples)
    return SFTTrainer(base, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=_lora())


def _plain(base: str, tokenizer: Any, examples: Any) -> Any:
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), _lora())
    arguments = TrainingArguments(**_settings(), bf16=True)
    return Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), Dataset.from_list(examples))


def loss_of(model: Any, examples: Any, autocast: bool = True) -> float:
    """Mean negative log-likelihood of the answer tokens, in float32; the model computes in bf16 with `autocast`."""
    import torch

    model.eval()
    total, count = 0.0, 0
    for e in examples:
        ids = torch.tensor([e["input_ids"]], device=model.device)
        labels = torch.tensor(e["labels"], device=model.device)[1:]
        start = int((labels != -100).nonzero()[0])
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, autocast):
            logits = model(input_ids=ids, logits_to_keep=len(labels) + 1 - start, use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.float(), labels[start:], reduction="sum"))
        count += len(labels) - start
    model.train()
    return total / count


def operations(model: Any, examples: Any) -> float:
    """Floating-point operations that one epoch needs, without padding and without the head at prompt positions."""
    import torch

    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = model.config
    head = shape.vocab_size * shape.hidden_size
    operations = 0.0
    for e in examples:
        n = len(e["input_ids"])
        answer = sum(label != -100 for label in e["labels"])
        operations += 4 * linear * n + 2 * trained * n + 4 * head * answer
        operations += 3 * 2 * shape.num_hidden_layers * shape.hidden_size * n * n  # causal attention: half of n x n
    return operations


def _matmul_rate() -> float:
    """Operations per second of bf16 products of 2048 x 2048 matrices."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(2048, 2048, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        (a @ b).float().sum().item()
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / median(times)


if __name__ == "__main__":
    main()
