"""(b) LoRA on a model of LLaMA-2-7B's shape: speed, share of the card's bf16 rate, and memory beside the plan.

Random weights made on the GPU, the settings of `llama2_7b_lora.yaml`, and 192 rows with the lengths of real rows of all
eight tasks (`lengths.json`); each optimizer step is one batch of eight rows. Where a batch does not fit it is halved.
The first WARM steps are left out of the times.

- ours, as the config: `trainers.base.CLTrainer`, with gradient checkpointing.
- ours, no checkpointing: the same without.
- TRL, its defaults: `trl.SFTTrainer` with SFTConfig's defaults, gradient checkpointing among them.
- TRL, its best: no checkpointing, fused AdamW, rows grouped by length; with liger-kernel its kernels, and with
  flash-attn packing instead of grouping. What it lacks is in the result.
- profile: the kernels that take most of the time of ours without checkpointing.

The share counts what the training needs, once: no padding, no repeated forward pass, no head at prompt positions.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu.shapes import byte_tokenizer, comparison, examples, large_args, large_config, large_model, train_large

TITLE = "LoRA at 7B"
LIMIT = 135
_PACKAGES = ("trl", "datasets", "lm-eval")
OURS = ("ours, no checkpointing", "ours, as the config")
TRL = ("TRL, its defaults", "TRL, its best")
ITEMS: dict[str, tuple[str, ...]] = {"card": ()} | dict.fromkeys((*OURS, *TRL, "profile"), _PACKAGES)
IMPORTS = ("trainers.base", "bench.training", "bench.scaling")
#: Dense bf16 operations a second in the data sheet, by a part of the card's name.
DATA_SHEET = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
WARM = 3
#: What TRL's best switches take, on a GPU alone.
GPU_ONLY = ("flash-attn", "liger-kernel")


def measure(item: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Trains one epoch; or the rate of the card."""
    if item == "card":
        return _card(tiny)
    steps = {"each": 6, "batch": 4} if tiny else {"each": None, "batch": 8}
    trained = None
    while trained is None:
        trained = _fitting(item, tiny, folder, steps["each"], steps["batch"])
        steps["batch"] //= 2
        gc.collect()
        _empty_cache()
    return trained


def _fitting(item: str, tiny: bool, folder: Path, each: int | None, batch: int) -> dict[str, Any] | None:
    """The measurement with so many rows in a batch; None where they need more memory than there is."""
    import torch

    try:
        return (_trl if item in TRL else _ours)(item, tiny, folder, each, batch)
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
        return None


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _card(tiny: bool) -> dict[str, Any]:
    """Bf16 products of square matrices, and what the data sheet says."""
    import torch

    from bench.gpu.shapes import device

    size, times = (256 if tiny else 8192), []
    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(20):
        _wait()
        started = time.perf_counter()
        left @ right
        _wait()
        times.append(time.perf_counter() - started)
    found: dict[str, Any] = {"matmul_size": size, "bf16_tflops_measured": round(2 * size**3 / median(times) / 1e12, 3)}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        sheet = next((rate for part, rate in DATA_SHEET.items() if part in name), None)
        found["bf16_tflops_data_sheet"] = sheet and sheet / 1e12
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    return found


def _wait() -> None:
    """Until the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ours(item: str, tiny: bool, folder: Path, each: int | None, batch: int) -> dict[str, Any]:
    from bench.scaling import one_gpu
    from trace_bench.run import read_json
    from trainers.base import CLConfig, CLTrainer

    class Measured(CLTrainer):
        def begin_stage(self) -> None:
            self.clock = clock(self, profiled=item == "profile")

        def record(self) -> dict[str, Any]:
            return {"found": self.clock.result()}

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.clock.see(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    checkpointing = item == "ours, as the config"
    options = ["--tasks", "trace_fomc", "--epochs", "1", "--per_device_train_batch_size", str(batch)]
    options += ["--gradient_checkpointing", str(checkpointing).lower()]
    run = train_large(Measured, CLConfig, folder / "run-large", tiny, options, each)
    record = read_json(run.stages[1].train_file)
    found: dict[str, Any] = record["found"]
    if item == "profile":
        return {"kernels": found["kernels"]}
    largest = found.pop("most_tokens"), found.pop("most_answer_tokens")
    plan = one_gpu(large_config(tiny), _adapter(), *largest, checkpointing)
    planned = {
        "planned_gb": round(sum(plan.values()) / 1e9, 2),
        "plan_gb": {k: round(v / 1e9, 2) for k, v in plan.items()},
    }
    return {"rows_in_a_batch": batch, "mean_loss": round(record["mean_loss"], 3), **found, **planned}


def _trl(item: str, tiny: bool, folder: Path, each: int | None, batch: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from bench.gpu.__main__ import missing

    args = large_args()
    lacking = list(GPU_ONLY if not torch.cuda.is_available() else missing(GPU_ONLY)) if item == TRL[1] else []
    best: dict[str, Any] = {}
    if item == TRL[1]:
        best = {"gradient_checkpointing": False, "optim": "adamw_torch_fused", "bf16": True}
        best |= {"use_liger_kernel": "liger-kernel" not in lacking}
        grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
        best |= grouped if "flash-attn" in lacking else {"packing": True}
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        learning_rate=args["learning_rate"],
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        max_length=args["max_prompt_length"] + args["max_answer_length"],
        lr_scheduler_type="constant",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **best,
    )
    model = large_model(tiny)
    if best.get("packing"):
        model.set_attn_implementation("flash_attention_2")
    rows = Dataset.from_list(examples(tiny, each=each))
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=byte_tokenizer(), peft_config=_adapter())
    timer = clock(trainer)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    loss = trainer.train().training_loss
    found = timer.result(examples(tiny, each=each))
    del found["most_tokens"], found["most_answer_tokens"]
    return {"rows_in_a_batch": batch, "lacks": ", ".join(lacking), "mean_loss": round(loss, 3), **found}


def _adapter() -> Any:
    """The config's adapter; PEFT's default modules, as there."""
    from peft import LoraConfig

    args = large_args()
    names = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **{k: args[v] for k, v in names.items()}
    )


def clock(trainer: Any, profiled: bool = False) -> Any:
    """Times the steps of a trainer, from now on; see `result` of what is returned."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.tokens: list[int] = []
            self.most = (0, 0)
            self.profiler = torch.profiler.profile() if profiled else None

        def see(self, inputs: Any) -> None:
            """Remembers the largest batch, padding included."""
            answers = int((inputs["labels"] != -100).sum())
            self.most = max(self.most, (inputs["input_ids"].numel(), answers))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            _wait()
            self.times.append(time.perf_counter())
            self.tokens.append(int(trainer._total_train_tokens))
            if self.profiler is not None and state.global_step == WARM:
                self.profiler.start()
            if self.profiler is not None and state.global_step == 2 * WARM:
                self.profiler.stop()
                control.should_training_stop = True
            return control

        def result(self, rows: Any = None) -> dict[str, Any]:
            if self.profiler is not None:
                return {"kernels": _kernels(self.profiler)}
            tokens = self.tokens[-1] - self.tokens[WARM - 1]
            seconds = self.times[-1] - self.times[WARM - 1]
            rate = tokens / seconds
            each = _operations_of_a_token(trainer.model, rows if rows is not None else trainer.train_dataset)
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
            return {
                "steps": len(self.times),
                "tokens_per_second": round(rate, 1),
                "tflops": round(rate * each / 1e12, 3),
                "peak_memory_gb": peak and round(peak / 1e9, 2),
                "most_tokens": self.most[0],
                "most_answer_tokens": self.most[1],
            }

    timer = Clock()
    trainer.add_callback(timer)
    return timer


def _operations_of_a_token(model: Any, rows: Any) -> float:
    from bench.training import operations

    return operations(model, rows) / sum(len(row["input_ids"]) for row in rows)


def _kernels(profiler: Any) -> list[list[Any]]:
    """The 15 kernels (on a CPU: operations) that took most of three steps: name, ms, share of all, calls."""
    import torch

    gpu = torch.cuda.is_available()
    events = [
        (event.key[:100], event.self_device_time_total if gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
        if not gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = sum(spent for _, spent, _ in events)
    events.sort(key=lambda event: -event[1])
    return [[name, round(spent / 1e3, 2), round(spent / (total or 1), 3), count] for name, spent, count in events[:15]]


def goals(done: dict[str, Any]) -> dict[str, Any]:
    """Share of the peak, times TRL's defaults, memory beside the plan."""
    found: dict[str, Any] = {}
    ours = [done[name] for name in OURS if name in done]
    best = max((run["tokens_per_second"] for run in ours), default=None)
    rates = (
        {key: done["card"].get(f"bf16_tflops_{key}") for key in ("data_sheet", "measured")} if "card" in done else {}
    )
    for name in (*OURS, *TRL):
        for key, rate in rates.items():
            if name in done and rate:
                share = done[name]["tflops"] / rate
                goal = (0.45, share >= 0.45) if key == "data_sheet" and name in OURS else ()
                found[f"{name}: share of the bf16 peak, {key.replace('_', ' ')}"] = comparison(round(share, 3), *goal)
    for name in TRL:
        if name in done and best:
            times = best / done[name]["tokens_per_second"]
            goal = (1.5, times >= 1.5) if name == TRL[0] else ()
            found[f"ours, times {name}"] = comparison(round(times, 3), *goal)
    for name in OURS:
        if name in done and done[name]["peak_memory_gb"]:
            off = done[name]["peak_memory_gb"] / done[name]["planned_gb"] - 1
            found[f"{name}: memory over the plan"] = comparison(round(off, 3), 0.1, abs(off) <= 0.1)
    return found
