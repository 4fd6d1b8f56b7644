"""Several processes train like one process with the batch of all, and an unfinished stage never counts as a stage."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import train
from datasets import Dataset
from distributed import train_jobs
from forks import forked_twice
from method_runs import THREE, method
from safetensors.torch import load_file
from torch.utils.data import RandomSampler

from bench import scaling
from trace_bench import waiting
from trace_bench.packaged import methods
from trace_bench.run import Run, RunError, read_json
from trainers.base import CLConfig, CLTrainer, ConfigError, LengthGrouped
from trainers.base.preflight import check_launch
from trainers.base.stages import _summary
from trainers.replay import _OwnThenReplayed

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "trainers" / "configs"


@pytest.fixture
def small(options):
    """Options of a method on two or three tasks, in two epochs of four steps in all, in float32 and by plain SGD.

    Adam would make large steps of the rounding in gradients that are nearly zero.
    """

    def small(name: str, folder: Path) -> dict:
        own = {
            "der": {"replay_ratio": 0.25, "tasks": THREE},  # whole batches in every stage
            # The weights of tokens by their probability are small in a model that knows nothing.
            "anchor": {"anchor_weight": "one", "tasks": ["trace_fomc", "trace_py150"]},
            "ewc": {"ewc_lambda": 100.0, "tasks": THREE},
            "ogd": {"ogd_rows": 4, "ogd_size": 6},
            "freeze": {"freeze_layers": 1},
            "hft": {"use_peft": False},
            "mofo": {"optim": "adamw_torch", "learning_rate": 0.01},
            "osf": {"use_peft": False, "learning_rate": 0.1},
            "stm": {"stm_threshold": 200.0, "tasks": ["trace_fomc", "trace_py150"]},
            "pp": {"prompt_tokens": 4, "learning_rate": 5.0},
            # Greedy: a temperature would make another answer of the rounding between one process and two.
            "opr": {"replay_ratio": 0.25, "opr_temperature": 0.0},
            "replay": {"replay_ratio": 0.25, "alignment_rows": 8},  # whole batches in every stage
            "seekr": {"replay_ratio": 0.25, "attn_implementation": "eager", "seekr_weight": 10.0},
            "sdft": {"sdft_tokens": 6, "learning_rate": 1.0},
            "lfpt5": {"prompt_tokens": 4, "learning_rate": 5.0, "max_answer_length": 20},
            # Answers of two tokens and of many.
            "joint": {"tasks": ["trace_fomc", "trace_py150"], "loss_weights": "tokens"},
            "lwf": {"tasks": ["trace_fomc", "trace_py150"]},
            "gem": {"train_sampling_strategy": "random", "tasks": THREE},  # two memories
        }
        return {
            **options,
            "output_dir": str(folder / name),
            "tasks": THREE[:2],
            "max_steps": -1,
            "num_train_epochs": 2.0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "group_by_length",
            "max_prompt_length": 300,
            "optim": "sgd",
            "learning_rate": 0.5,
            "lora_dropout": 0.0,
            "dtype": "float32",
            "bf16": False,
            **own.get(name, {}),
        }

    return small


def tensors(run: Run) -> dict[str, torch.Tensor]:
    """All that is on the disk: the checkpoint of each stage, and the state of the method."""
    files = sorted(run.path.glob("stages/*/*/*.safetensors"))
    return {f"{f.relative_to(run.path)}:{k}": v.double() for f in files for k, v in load_file(f).items()}


def norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(torch.stack([(a[k] - b[k]).square().sum() for k in a]).sum().sqrt())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_train_every_method_like_one_with_twice_the_batch(small, tmp_path, record_property):
    names = [m for m in methods() if m != "icl"]
    forked_twice(train_jobs, [{"method": n, "options": small(n, tmp_path / "two")} for n in names])
    errors = {}
    for name in names:
        two = Run.open(tmp_path / "two" / name)
        assert two.manifest["processes"] == 2
        one = train({**small(name, tmp_path / "one"), "per_device_train_batch_size": 4}, *method(name))
        moved = 0.0
        for a, b in zip(one.stages[1:], two.stages[1:], strict=True):
            a, b = read_json(a.train_file), read_json(b.train_file)
            assert b["processes"] == 2 and b["moved"] > 0.05, name
            moved += b["moved"]
            assert [a[k] for k in ("rows", "steps", "tokens")] == [b[k] for k in ("rows", "steps", "tokens")], name
            assert [e["loss"] for e in b["losses"]] == pytest.approx([e["loss"] for e in a["losses"]], rel=1e-3), name
            assert a.get("projected_steps") == b.get("projected_steps")
        checkpoints = [{k: v for k, v in tensors(r).items() if "method_state" not in k} for r in (one, two)]
        errors[name] = norm(*checkpoints) / moved
        print(f"{name}: {errors[name]:.1e} of {moved:.2f}")
        states = [{k: v for k, v in tensors(r).items() if "method_state" in k} for r in (one, two)]
        if name == "ewc":
            assert states[0] and norm(*states) < 1e-3 * norm(states[0], {k: 0 * v for k, v in states[0].items()})
    record_property("counts", {"methods trained by two processes": len(names)})
    assert errors.pop("osf") < 1e-3, "singular vectors of a model without structure turn easily"
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_process_leaves_no_stage_and_the_resumed_run_has_the_same_bytes(small, tmp_path):
    """Killed in the second epoch, whose order is another one than that of the first: it goes on with the rows left."""
    changes = {"train_rows": 24, "save_strategy": "steps", "save_steps": 1}
    job, whole = ({"method": "ewc", "options": small("ewc", tmp_path / f) | changes} for f in ("killed", "whole"))
    killed = Run(Path(job["options"]["output_dir"]), {"tasks": THREE})
    for stage, at, step in ((1, "step", 4), (2, "step", 1), (3, "save", 0)):
        with pytest.raises(RuntimeError):  # of the pool, or of the process that finds the other one gone
            forked_twice(train_jobs, [{**job, "kill": {"stage": stage, "at": at, "step": step}}])
        assert [s.is_trained for s in killed.stages[1:]] == [i < stage for i in (1, 2, 3)]
    with pytest.raises(RunError, match="processes: 2 -> 'absent'"):
        train(job["options"], *method("ewc"))
    evaluated = small("sequential", tmp_path) | {"tasks": THREE[:1], "keep": "evaluated", "test_rows": 2}
    forked_twice(train_jobs, [job, whole, {"method": "sequential", "options": evaluated}])
    a, b = (tensors(Run.open(j["options"]["output_dir"])) for j in (job, whole))
    assert any("method_state" in k for k in a) and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list(killed.path.rglob(".*.tmp")) and not list(killed.path.rglob(".trainer"))
    # The evaluation between stages is a separate program, started by one of the processes.
    cells = [len(list((s.path / "eval").glob("*.json"))) for s in Run.open(evaluated["output_dir"]).stages]
    assert cells == [1, 1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_others_wait_for_the_first_process_without_a_time_limit(small, tmp_path):
    options = small("sequential", tmp_path) | {"keep": "evaluated", "tasks": THREE[:1], "max_steps": 1}
    forked_twice(train_jobs, [{"method": "sequential", "options": options, "alone": 12}])
    assert Run.open(options["output_dir"]).stages[1].is_trained


# ---------------------------------------------------------------------------------------------- without more processes


@pytest.mark.parametrize("kind", [RandomSampler, lambda rows: LengthGrouped([len(str(i)) for i in rows], 2, seed=5)])
def test_the_order_of_replay_is_the_same_in_every_process(kind):
    orders = []
    for noise in (0, 1):
        torch.manual_seed(noise)  # dropout on other lengths has drawn other numbers
        orders.append(list(_OwnThenReplayed(kind(range(20)), 50, kind(range(7)), 20, seed=3)))
    assert orders[0] == orders[1]
    epochs = [orders[0][:20], orders[0][20:40]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    assert len(set(orders[0][40:50])) == 10 and sorted(orders[0][50:]) == list(range(20, 27))


def test_waiting_for_a_process_that_has_ended_is_a_one_line_error(monkeypatch):
    def gone(group):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    there = {"is_available": lambda: True, "is_initialized": lambda: True, "get_world_size": lambda: 2}
    monkeypatch.setattr(torch, "distributed", SimpleNamespace(**there, new_group=lambda **k: "all", barrier=gone))
    with pytest.raises(RunError, match="Another process of this training failed: see its"), waiting.others_wait():
        pass
    with pytest.raises(OSError, match="disk"), waiting.others_wait():  # its own error stays its own
        raise OSError("disk")


def test_the_memory_of_a_training_on_the_cpu_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    args = CLConfig(output_dir="x", tasks=["trace_fomc"], use_cpu=True)
    state = SimpleNamespace(global_step=1, epoch=1.0, log_history=[])
    parts = {
        "stage": SimpleNamespace(index=1, task="trace_fomc"),
        "_resumed_from": {"losses": 1.0},
        "_replayed_rows": {},
    }
    parts |= {"train_dataset": Dataset.from_list([{}]), "accelerator": SimpleNamespace(num_processes=1)}
    totals = {"_total_train_tokens": 1, "_total_loss_scalar": 0.0, "model": torch.nn.Linear(1, 1)}
    found = _summary(SimpleNamespace(args=args, state=state, **parts, **totals), 1.0)
    assert found["memory_of"] == "process" and found["peak_memory_bytes"] > 10**6


@pytest.mark.parametrize("name", ["lwf", "osf"])  # asked for by FSDP's launch: test_methods.py
def test_methods_that_need_whole_weights_refuse_an_option_that_divides_them(name):
    asked = SimpleNamespace(deepspeed="zero3.json", fsdp=None)
    with pytest.raises(ConfigError, match=r"whole weights.*DeepSpeed gives each process only a part"):
        method(name)[0].prepare(asked, SimpleNamespace(use_peft=name != "osf"))


@pytest.mark.parametrize("file", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_launch_files_name_their_command_and_save_complete_checkpoints(file, monkeypatch):
    text = file.read_text()
    assert text.startswith(f"# accelerate launch --config_file trainers/configs/accelerate/{file.name} ")
    args, environment = scaling.read_launch(file.name)
    assert args.num_processes == 8 * args.num_machines and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    check_launch()
    for key, allowed in (
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"),
        ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true"),
    ):
        if environment.get(key, "").lower() == allowed.lower():
            monkeypatch.delenv(key)
            with pytest.raises(ConfigError, match=f"(?i:not set).*Set it to {allowed}"):
                check_launch()
            break
    else:
        assert args.zero_stage == 2, "every other file is about saving"


def test_a_stage_without_weights_is_no_stage(options, monkeypatch):
    monkeypatch.setattr(CLTrainer, "save_model", lambda self, folder: (Path(folder) / "pytorch_model").touch())
    with pytest.raises(RunError, match="would have no weights"):
        train(options)
    stage = Run.open(options["output_dir"]).stages[1]
    assert not stage.is_trained and not (stage.path / "adapter").exists()


def test_the_slurm_job_launches_one_accelerate_per_machine(tmp_path):
    stubs = {
        "scontrol": "echo node-a; sleep 0.2; echo node-b",
        "srun": 'for i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
        "trace-bench": 'printf "<%s>" "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "RUN": "runs/x"}
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **given, "SLURM_ARRAY_TASK_ID": "3"}

    def job(name, **more):
        script = str(CONFIGS / "slurm" / name)
        return subprocess.run(["bash", script], env=env | more, capture_output=True, text=True, check=True).stdout

    from accelerate.commands.launch import launch_command_parser

    commands = job("train.sbatch").splitlines()
    assert len(commands) == 2
    for rank, command in enumerate(commands):
        args = launch_command_parser().parse_args(command.split()[1:])
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, rank)
        assert args.main_process_ip == "node-a" and args.module and args.training_script == "trainers.sequential"
        assert (ROOT / args.config_file).is_file() and (ROOT / args.training_script_args[1]).is_file()
        assert args.training_script_args[2:] == ["--output_dir", "runs/x"]
    assert job("evaluate.sbatch") == "<evaluate><runs/x><--share><--stages><3>"
    launch = "accelerate launch --num_processes 8"
    study = "<study><trainers/configs/studies/sweep.yaml><--full><--only><3>"
    assert job("sweep.sbatch") == study
    assert job("sweep.sbatch", LAUNCH=launch) == f"{study}<--launch><{launch}>"


def test_the_slurm_array_of_the_sweep_has_all_its_runs():
    from trace_bench.study import read_study

    runs = read_study(CONFIGS / "studies" / "sweep.yaml", full=True)
    assert f"#SBATCH --array=1-{len(runs)}%" in (CONFIGS / "slurm" / "sweep.sbatch").read_text()


@pytest.mark.parametrize("plan", scaling.PLANS, ids=lambda p: p.config)
def test_the_tables_of_scaling_md_equal_those_of_bench_scaling(plan):
    pins = dict(line.split("==") for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if "==" in line)
    others = [name for name in ("accelerate", "peft", "transformers") if version(name) != pins[name]]
    if others:
        pytest.skip(f"docs/scaling.md is of the pinned versions, not of these of {', '.join(others)}")
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.tables(plan) in text
    parts, counts = scaling.memory(plan)
    for copies in (1, 2) if counts["GPUs"] == 8 else (1, 16):
        assert f"{16 * counts['parameters'] / copies / 1e9:.0f} GB" in text, "all parameters trained"
    assert counts["rows of an optimizer step"] == 128, "the paper's batch"
    assert sum(parts.values()) < scaling.MEMORY
