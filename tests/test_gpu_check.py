"""The check of a GPU (`bench.gpu`), tested on a CPU: finished measurements are always kept, and tiny shapes pass."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu_part
import pytest
import torch
from forks import Child

from bench import scaling
from bench.gpu import __main__ as gpu
from bench.gpu import large, resume, shapes

ABOUT = {"gpu": "a card"}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of results. The processes find the tests' own part."""
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{gpu.ROOT}")
    return tmp_path / "results.json"


def measurements(file, name="x"):
    return json.loads(file.read_text())["a card"][name]["measurements"]


def test_finished_measurements_are_kept_when_others_fail(file, capsys, monkeypatch):
    later = SimpleNamespace(**{**vars(gpu_part), "LIMIT": 3, "ITEMS": {"late": ()}})
    monkeypatch.setattr(gpu, "SECONDS", 9)
    gpu.check({"x": gpu_part, "y": later}, file, ABOUT, tiny=False, again=False)
    found = measurements(file)
    assert found["counts"]["times"] == 1
    assert found["needs"]["skipped"] == "no-such-package not installed"
    assert re.match(r"exit code -9: no memory left", found["dies"]["failed"])
    assert re.match(r"not done in the [1-6] s", found["sleeps"]["stopped"])
    assert found["late"]["stopped"] == "not done in the 0 s that were left"
    assert "| counted | 1 | 1 | yes |" in capsys.readouterr().out

    assert not set(measurements(file, "y")["late"]) & set(gpu.NOT_DONE), "the part before has left it its seconds"

    # Another part of another day, on the same card.
    gpu.check({"z": later}, file, ABOUT, tiny=False, again=False)
    assert measurements(file) == found and "took" in measurements(file, "z")["late"]


def test_only_missing_measurements_are_made_unless_repeated_by_option(file, monkeypatch):
    monkeypatch.setattr(gpu_part, "ITEMS", {"counts": (), "needs": ("no-such-package",)})
    for again, times in ((False, 1), (False, 1), (True, 2)):
        gpu.check({"x": gpu_part}, file, ABOUT, tiny=False, again=again)
        assert measurements(file)["counts"]["times"] == times
    monkeypatch.setattr(gpu_part, "ITEMS", {"counts": (), "needs": ()})
    gpu.check({"x": gpu_part}, file, ABOUT, tiny=False, again=False)
    found = measurements(file)
    assert found["counts"]["times"] == 2 and "skipped" not in found["needs"], "its package is there now"


def test_the_gpu_check_without_a_gpu_says_what_to_do():
    with pytest.raises(SystemExit, match=r"no GPU .* --tiny"):
        gpu.main([])


def test_too_old_packages_are_named_before_any_measurement(monkeypatch):
    assert not gpu.outdated()
    monkeypatch.setattr(gpu, "version", {"transformers": "5.16.0", "trl": "1.16.0"}.get)
    monkeypatch.setattr(gpu, "COMPARED", ("transformers", "trl"))
    with pytest.raises(SystemExit, match=r"^transformers 5\.16\.0 \(at least 5\.16\.1\): too old"):
        gpu.main(["--tiny"])


def test_the_limits_of_all_parts_fit_into_eight_minutes():
    assert sum(part.LIMIT for part in gpu.PARTS.values()) <= gpu.SECONDS < 8 * 60


def test_rows_have_the_lengths_of_the_table_cut_by_the_config():
    table = json.loads(shapes.LENGTHS.read_text())
    args = shapes.large_args()
    wanted = [
        (min(prompt, args["max_prompt_length"]), min(answer, args["max_answer_length"]))
        for task, lengths in table.items()
        if task != "about"
        for prompt, answer in lengths
    ]
    rows = shapes.examples(tiny=False)
    answers = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert [(len(row["input_ids"]) - n, n) for row, n in zip(rows, answers, strict=True)] == wanted
    assert len(shapes.examples(tiny=False, each=8)) == len(wanted) // 3


def test_goals_are_computed_from_the_measurements():
    ours = {"tokens_per_second": 1500.0, "tflops": 500.0, "peak_memory_gb": 22.0, "planned_gb": 20.5}
    done = {
        "card": {"bf16_tflops_measured": 800.0, "bf16_tflops_data_sheet": 1000.0},
        "ours, no checkpointing": ours,
        "ours, as the config": {**ours, "tokens_per_second": 900.0, "tflops": 300.0, "peak_memory_gb": 25.0},
        "TRL, its defaults": {"tokens_per_second": 1200.0, "tflops": 400.0},
    }
    found = large.goals(done)
    share = "ours, no checkpointing: share of the bf16 peak, "
    assert found[share + "data sheet"] == {"goal": 0.45, "found": 0.5, "met": True}
    assert found[share + "measured"]["found"] == 0.625
    assert not found["ours, as the config: share of the bf16 peak, data sheet"]["met"]
    # Beside TRL with the same checkpointing.
    assert found["ours, as the config, times TRL, its defaults"] == {"goal": 1.5, "found": 0.75, "met": False}
    assert "ours, no checkpointing, times TRL, its best" not in found
    assert found["ours, no checkpointing: memory over the plan"]["met"]
    assert not found["ours, as the config: memory over the plan"]["met"]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200 MIG 1g.18gb", None), ("NVIDIA T4", None)],
)
def test_the_data_sheet_is_that_of_the_whole_card(name, tflops):
    assert large.data_sheet(name) == (tflops and tflops * 1e12)


@pytest.mark.parametrize(
    ("killed", "again", "goals"),
    [
        ("plain", None, [(True, True)]),
        ("other", None, []),  # nobody knows yet whether this card always gives the same bytes
        ("other", "plain", [(False, False)]),
        ("other", "third", [(0.02, True)]),
        ("far", "third", [(0.5, False)]),
    ],
)
def test_a_resumed_stage_is_compared_with_what_the_card_repeats(killed, again, goals):
    losses = {"plain": [2.0, 1.0], "other": [2.0, 1.02], "third": [2.0, 1.01], "far": [2.0, 1.5]}
    runs = {"undisturbed": "plain", "killed": killed, "again": again}
    done = {item: {"adapter": run, "losses": losses[run]} for item, run in runs.items() if run}
    assert [(goal["found"], goal["met"]) for goal in resume.goals(done).values()] == goals


def test_kernels_of_a_profile_count_once(monkeypatch):
    kinds = torch.autograd.DeviceType
    seen = [
        ("gemm", kinds.CUDA, 300.0),
        ("copy", kinds.CUDA, 100.0),
        ("around", kinds.CUDA, 400.0),
        ("mm", kinds.CPU, 0.0),
    ]
    events = [
        SimpleNamespace(key=k, device_type=d, self_device_time_total=t, count=2, is_user_annotation=k == "around")
        for k, d, t in seen
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = large._kernels(SimpleNamespace(key_averages=lambda: events))
    assert found == [["gemm", 0.3, 0.75, 2], ["copy", 0.1, 0.25, 2]]


def test_the_planned_bytes_of_a_layer_with_an_adapter_equal_those_by_hand():
    config, adapter = shapes.large_config(tiny=False), large._adapter()
    kept = scaling.kept_by_layer(config, adapter)
    assert kept == pytest.approx(scaling.kept_by_layer(config, adapter, scale=16), rel=0.03), "it grows with the width"
    # By hand, bytes a token at width h and 2.7 h: two norms in float32 (8 h), query, key, value and what attention
    # gives (8 h), the MLP's gate, its SiLU and up (6 x 2.7 h), and of two adapters a dropped input and a mask (6 h).
    assert kept == pytest.approx((8 + 8 + 6 * 11008 / 4096 + 6) * 4096, rel=0.05)
    plan = [scaling.one_gpu(config, adapter, tokens, 100, checkpointing=False) for tokens in (1000, 2000)]
    assert plan[0]["weights"] == pytest.approx(2 * 6_738_415_616 + 4 * 4_194_304)
    of_a_token = 32 * kept + 2 * (4096 + 3 * 11008)
    assert sum(plan[1].values()) - sum(plan[0].values()) == 1000 * of_a_token


class Module(Child):
    """`python -m MODULE ARGUMENTS` as a fork, with the slow imports done."""

    def __init__(self, words, cwd=None, env=None, stdin=None, stdout=None, stderr=None, process_group=None):
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb")

        def program():
            self.stdin.close()
            sys.stdin = os.fdopen(read)
            sys.argv[:] = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)

        super().__init__(program, env, stdout)
        os.close(read)


@pytest.mark.slow
def test_a_contender_that_computes_nan_is_not_timed(tmp_path, monkeypatch):
    def broken(tiny):
        model = shapes.large_model(tiny)
        model.model.norm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(large, "large_model", broken)
    with pytest.raises(FloatingPointError, match="TRL, its defaults: the loss is nan"):
        large.measure("TRL, its defaults", True, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tiny_shapes_pass_the_check_on_a_cpu(tmp_path, monkeypatch):
    some = {
        "a": ("float32 CPU", "float32 GPU"),
        "b": ("card", "ours, as the config", "TRL, its best", "profile"),
        "c": ("sequential", "lwf"),
        "d": ("killed",),
    }
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    for module in (gpu, resume):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Module}))
    for name, items in some.items():
        part = gpu.PARTS[name]
        monkeypatch.setattr(part, "ITEMS", {item: part.ITEMS[item] for item in items})
        for module in part.IMPORTS:
            importlib.import_module(module)
    file = tmp_path / "results.json"
    gpu.main(["--tiny", "--parts", *some, "--results", str(file)])
    (card,) = json.loads(file.read_text()).values()
    for name in some:
        for item, found in card[name]["measurements"].items():
            assert not set(found) & set(gpu.NOT_DONE), (name, item, found)
    assert all(goal["met"] for goal in card["a"]["goals"].values())
    large_ones = card["b"]["measurements"]
    assert large_ones["TRL, its best"]["tokens_per_second"] > 0 and large_ones["profile"]["kernels"]
    memory = [goal for name, goal in card["b"]["goals"].items() if "memory over the plan" in name]
    assert memory and all(goal["met"] for goal in memory)
    assert card["c"]["goals"]["lwf: steps over sequential"]["found"] > 0
    assert card["d"]["measurements"]["killed"]["killed_at_step"] < resume.steps(tiny=True)[0]


def test_the_documentation_says_whether_the_gpu_check_was_run():
    page = (gpu.ROOT / "docs" / "speed.md").read_text()
    section = page.partition("## On a GPU")[2].partition("\n## ")[0]
    assert ("Not run" in section) != gpu.RESULTS.exists()
