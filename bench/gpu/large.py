"""(b) LoRA on a model of LLaMA-2-7B's shape: speed, share of the card's bf16 rate, and memory against the plan.

The model has random weights made on the GPU and the settings of `llama2_7b_lora.yaml`. The 192 rows have the lengths of
real rows of all eight tasks (`lengths.json`). Each optimizer step is one batch of eight rows, which is halved if it
does not fit. All contenders see the same rows in each of EPOCHS epochs. The first epoch is reported separately and does
not count for the rate: kernels are compiled and chosen for each new length.

- ours, as the config: `trainers.base.CLTrainer`, with gradient checkpointing.
- ours, no checkpointing: the same without checkpointing.
- TRL, its defaults: `trl.SFTTrainer` with SFTConfig's defaults, which include gradient checkpointing. As in a stage, a
  batch has random rows of one task; with rows of all eight tasks it would have far more padding.
- TRL, its best: no checkpointing and our sampler's batches; with liger-kernel also its kernels, and with flash-attn
  packing instead of these batches. The result lists the missing packages.
- profile: the kernels that take most of the time of ours without checkpointing.

The share counts each necessary operation once: no padding, no repeated forward pass, no head at prompt positions.
"""

from __future__ import annotations

import gc
import math
import os
import random
import shutil
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu.shapes import (
    byte_tokenizer,
    comparison,
    device,
    examples,
    large_args,
    large_config,
    large_model,
    train_large,
)

TITLE = "LoRA at 7B"
LIMIT = 140
_PACKAGES = ("trl", "datasets", "lm-eval")
#: Each variant of ours -> the contender with the same checkpointing.
OURS = ("ours, no checkpointing", "ours, as the config")
TRL = ("TRL, its best", "TRL, its defaults")
#: The measurements, the most valuable ones first.
ITEMS: dict[str, tuple[str, ...]] = {"card": ()} | dict.fromkeys((*OURS, *TRL, "profile"), _PACKAGES)
IMPORTS = ("trainers.base", "bench.training", "bench.scaling")
#: A part of the card's name -> dense bf16 operations per second in its data sheet.
DATA_SHEET = {
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12},
    **{"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12},
}
EPOCHS = 3
#: The number of steps before the profile, and of steps in it.
PROFILED = 3
#: The packages that TRL's best settings need; they exist for GPUs only.
GPU_ONLY = ("flash-attn", "liger-kernel")


def measure(item: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Trains, or measures the rate of the card."""
    import torch

    if item == "card":
        return _card(tiny)
    batch = 4 if tiny else 8
    while True:
        try:
            return (_trl if item in TRL else _ours)(item, tiny, folder, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        gc.collect()  # not in the except block, where the error still refers to the model
        torch.cuda.empty_cache()


def _card(tiny: bool) -> dict[str, Any]:
    """Times bf16 products of square matrices, and reads the data sheet and the driver."""
    import torch

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
        sheet = data_sheet(torch.cuda.get_device_name())
        found |= {} if sheet is None else {"bf16_tflops_data_sheet": sheet / 1e12}
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
        if shutil.which("nvidia-smi"):
            which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            ask = ["nvidia-smi", "-i", which, "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
            found["driver_and_power_limit"] = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    return found


def data_sheet(name: str) -> float | None:
    """A card's dense bf16 operations per second in its data sheet; None for unknown cards, and parts of one (MIG)."""
    return None if "MIG" in name else next((rate for part, rate in DATA_SHEET.items() if part in name), None)


def _wait() -> None:
    """Waits until the GPU has finished its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rows(tiny: bool) -> list[dict[str, list[int]]]:
    return examples(tiny, each=2 if tiny else None)


def _ours(item: str, tiny: bool, folder: Path, batch: int) -> dict[str, Any]:
    from bench.scaling import one_gpu
    from trace_bench.run import read_json
    from trainers.base import CLConfig, CLTrainer

    class Measured(CLTrainer):
        most = (0, 0)  # tokens and answer tokens of the largest batch, with padding

        def begin_stage(self) -> None:
            self.clock = _profile(self) if item == "profile" else clock(self)

        def record(self) -> dict[str, Any]:
            return {"found": self.clock.result(_rows(tiny)), "most": self.most}

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            answers = int((inputs["labels"] != -100).sum())
            self.most = max(self.most, (inputs["input_ids"].numel(), answers))
            return super().training_step(model, inputs, *args, **kwargs)

    checkpointing = item == "ours, as the config"
    options = ["--tasks", "trace_fomc", "--epochs", str(EPOCHS), "--per_device_train_batch_size", str(batch)]
    options += ["--gradient_checkpointing", str(checkpointing).lower()]
    run = train_large(Measured, CLConfig, folder / "run-large", tiny, options, 2 if tiny else None)
    record = read_json(run.stages[1].train_file)
    found: dict[str, Any] = record["found"]
    if item == "profile":
        return found
    plan = one_gpu(large_config(tiny), _adapter(), *record["most"], checkpointing)
    planned = {
        "planned_gb": gigabytes(sum(plan.values())),
        "plan_gb": {k: gigabytes(v) for k, v in plan.items()},
    }
    return {"rows_in_a_batch": batch, "mean_loss": round(record["mean_loss"], 3), **found, **planned}


def _trl(item: str, tiny: bool, folder: Path, batch: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from bench.gpu.__main__ import missing
    from trainers.base import LengthGrouped

    args, rows = large_args(), _rows(tiny)
    lacking: list[str] = []
    best: dict[str, Any] = {}
    if item == "TRL, its best":
        lacking = list(GPU_ONLY if not torch.cuda.is_available() else missing(GPU_ONLY))
        best = {"gradient_checkpointing": False, "use_liger_kernel": "liger-kernel" not in lacking}
        best["packing"] = "flash-attn" not in lacking
        rows = [rows[i] for i in LengthGrouped([len(row["input_ids"]) for row in rows], batch, seed=0)]
    else:
        draw, each = random.Random(0), len(rows) // 8
        rows = [row for n in range(0, len(rows), each) for row in draw.sample(rows[n : n + each], each)]
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        learning_rate=args["learning_rate"],
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=batch,
        max_length=args["max_prompt_length"] + args["max_answer_length"],
        train_sampling_strategy="sequential",  # the rows are in order already
        lr_scheduler_type="constant",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # otherwise a NaN counts as the mean of the losses before it
        **best,
    )
    model = large_model(tiny)
    if config.packing:
        model.set_attn_implementation("flash_attention_2")
    data = Dataset.from_list(rows)
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=byte_tokenizer(), peft_config=_adapter())
    timer = clock(trainer)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    loss = trainer.train().training_loss
    if not math.isfinite(loss):  # products of NaN take a card less power, and so less time
        raise FloatingPointError(f"{item}: the loss is {loss}, so the times would be those of nothing.")
    return {"rows_in_a_batch": batch, "lacks": ", ".join(lacking), "mean_loss": round(loss, 3), **timer.result(rows)}


def _adapter() -> Any:
    """The adapter of the config, which has PEFT's default modules."""
    from peft import LoraConfig

    args = large_args()
    names = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **{k: args[v] for k, v in names.items()}
    )


def gigabytes(size: float) -> float:
    """Bytes in GB, to four digits."""
    return float(f"{size / 1e9:.4g}")


def clock(trainer: Any) -> Any:
    """Times the epochs of a trainer from now on. The returned object's `result` gives the numbers."""
    import torch
    from transformers import TrainerCallback

    from bench.gpu.live import LiveBytes
    from bench.scaling import dropout_of_a_gpu

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if not torch.cuda.is_available():
                dropout_of_a_gpu(trainer.model)
                self.live = LiveBytes(trainer.model)
                self.live.__enter__()
            self.on_epoch_end()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            _wait()
            self.ends.append(time.perf_counter())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            if not torch.cuda.is_available():
                self.live.__exit__(None, None, None)

        def result(self, rows: list[Any]) -> dict[str, Any]:
            """The numbers for the rows of an epoch. Padding never counts."""
            from bench.training import operations

            tokens = sum(len(row["input_ids"]) for row in rows)
            first, *timed = (end - begin for begin, end in pairwise(self.ends))
            seconds = sum(timed) / len(timed)
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.live.peak
            return {
                "tokens": tokens,
                "tokens_per_second": round(tokens / seconds, 1),
                "tokens_per_second_first_epoch": round(tokens / first, 1),
                "seconds": [round(s, 3) for s in (first, *timed)],
                "tflops": round(operations(trainer.model, rows) / seconds / 1e12, 3),
                "peak_memory_gb": gigabytes(peak),
            }

    timer = Clock()
    trainer.add_callback(timer)
    return timer


def _profile(trainer: Any) -> Any:
    """Profiles a few steps of a trainer and ends its training. The returned object's `result` gives the numbers."""
    import torch
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            _wait()
            if state.global_step == PROFILED:
                self.profiler = torch.profiler.profile()
                self.profiler.start()
            elif state.global_step == 2 * PROFILED:
                self.profiler.stop()
                control.should_training_stop = True
            return control

        def result(self, rows: Any) -> dict[str, Any]:
            return {"kernels": _kernels(self.profiler)}

    profile = Profile()
    trainer.add_callback(profile)
    return profile


def _kernels(profiler: Any) -> list[list[Any]]:
    """The 15 kernels (on a CPU: operations) that took most of the time: name, ms, share of all, calls."""
    import torch

    gpu = torch.cuda.is_available()
    events = [
        (event.key[:100], event.self_device_time_total if gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
        # The optimizer's step is a separate event around its kernels.
        if not gpu or (event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation)
    ]
    total = sum(spent for _, spent, _ in events)
    events.sort(key=lambda event: -event[1])
    return [[name, round(spent / 1e3, 2), round(spent / (total or 1), 3), count] for name, spent, count in events[:15]]


def goals(done: dict[str, Any]) -> dict[str, Any]:
    """The share of the peak, the speed against TRL with the same checkpointing, and the memory against the plan."""
    found: dict[str, Any] = {}
    rates = (
        {key: done["card"].get(f"bf16_tflops_{key}") for key in ("data_sheet", "measured")} if "card" in done else {}
    )
    for name in (*OURS, *TRL):
        for key, rate in rates.items():
            if name in done and rate:
                share = done[name]["tflops"] / rate
                goal = (0.45, share >= 0.45) if key == "data_sheet" and name in OURS else ()
                found[f"{name}: share of the bf16 peak, {key.replace('_', ' ')}"] = comparison(round(share, 3), *goal)
    for name, other in zip(OURS, TRL, strict=True):
        if name in done and other in done:
            times = done[name]["tokens_per_second"] / done[other]["tokens_per_second"]
            goal = (1.5, times >= 1.5) if other == "TRL, its defaults" else ()
            found[f"{name}, times {other}"] = comparison(round(times, 3), *goal)
    for name in OURS:
        if name in done:
            off = done[name]["peak_memory_gb"] / done[name]["planned_gb"] - 1
            found[f"{name}: memory over the plan"] = comparison(round(off, 3), 0.1, abs(off) <= 0.1)
    return found
