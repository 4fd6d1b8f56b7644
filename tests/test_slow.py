"""Whole pipelines and real inference engines, which take minutes (make test-slow)."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from architectures import make_writer
from conftest import command_line, pieces_tokenizer, train
from forks import run_module, start_module

from trace_bench import report
from trace_bench.run import Run, read_json
from trace_tasks import data
from trace_tasks.data.files import write_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]
THREE = ["trace_fomc", "trace_py150", "trace_numglue_ds"]


@pytest.fixture
def small(demo_data, monkeypatch) -> None:
    """The environment of programs that start vLLM."""
    for name, value in {"KVCACHE_SPACE": "1", "NUM_OF_RESERVED_CPU": "0"}.items():
        monkeypatch.setenv(f"VLLM_CPU_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def killed_until_done(rng: random.Random, kills: int, *words: object) -> None:
    """Runs a command, kills it a few times at random moments, and then lets it end."""
    for _ in range(kills):
        process = start_module(*words)
        process.join(rng.uniform(1, 6))
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    run_module(*words)


def test_the_whole_pipeline_killed_and_resumed_ends_in_the_same_matrix(options, tmp_path):
    options = {**options, "tasks": THREE, "train_rows": 32, "max_steps": 24, "cells": "all"}
    rng = random.Random(0)
    scores = []
    for name, kills in (("whole", 0), ("killed", 3)):
        run = tmp_path / name
        killed_until_done(rng, kills, "trainers.sequential", *command_line({**options, "output_dir": run}))
        killed_until_done(rng, kills, "trace_bench", "evaluate", run)
        run_module("trace_bench", "report", run)
        scores.append((run / "scores.csv").read_text())
        assert not np.isnan(report.Results(Run.open(run)).R).any()
    assert scores[0] == scores[1]
    assert scores[0].count("\n") > 4 * 3, "four stages, three tasks, at least one metric each"


def test_vllm_draws_answers_to_more_prompts_than_it_reads_at_once(tiny_model, tmp_path):
    """A prompt that is read in parts cannot be drawn from on a CPU."""
    prompts = [[5 + (i * n) % 90 for n in range(1, 101)] for i in range(60)]  # 6,000 tokens, and vLLM reads 4,096
    job = {"prompts": prompts, "most": 8, "stops": [], "samples": 2, "seed": 3, "rated": True, "made_from": "it"}
    engine = {"backend": "vllm", "base": str(tiny_model), "revision": None, "checkpoint": None}
    args = {"max_model_len": 128, "max_num_batched_tokens": 100, "max_num_seqs": 64, "dtype": "float32"}
    drawn = []
    for name, given in (("few", args), ("many", {**args, "max_num_batched_tokens": 4096})):
        file = tmp_path / f"{name}.json"
        jobs = [{**job, "sampling": {"temperature": 1.0}, "file": str(file)}]
        write_json(tmp_path / "order.json", {**engine, "engine_args": given, "jobs": jobs})
        run_module("trainers.base.answering", tmp_path / "order.json")
        drawn.append([[text for text, *_ in row] for row in read_json(file)["answers"]])
    assert drawn[0] == drawn[1], "what is drawn depends on the seed, not on how prompts are read"
    assert all(len(row) == 2 for row in drawn[0]) and sum(a != b for a, b in drawn[0]) > 30


@pytest.mark.parametrize(
    ("backend", "include"), [("hf", False), ("vllm", True)], ids=["installed-hf", "include_path-vllm"]
)
def test_plain_lm_eval_runs_the_tasks(backend, include, tiny_model, tmp_path, small):
    """Runs the exact command of the README. `installed` changes lm-eval as `make setup` does."""
    tasks = run_module("trace_bench", "tasks-path", *([] if include else ["--install"])).splitlines()[0]
    extra = ",max_model_len=1024,enforce_eager=True" if backend == "vllm" else ""
    arguments = [
        *("run", "--model", backend, "--model_args", f"pretrained={tiny_model},dtype=float32{extra}"),
        *("--tasks", "trace_*", "--limit", "2", "--gen_kwargs", "max_gen_toks=4", "--output_path", str(tmp_path)),
        *(["--include_path", tasks] if include else ["--device", "cpu", "--num_fewshot", "6"]),
    ]
    subprocess.run([str(Path(sys.executable).with_name("lm_eval")), *arguments], cwd=tmp_path, check=True)
    (results,) = tmp_path.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    assert sorted(scores) == sorted(data.FOLDERS)
    assert all(0 <= s["sari,none"] <= 1 for t, s in scores.items() if t == "trace_20minuten")


def test_a_real_server_and_a_local_model_judge_alike(options, tmp_path, small):
    """`vllm serve` over HTTP and `--local` have the same chat template and limits, and every pair is counted."""
    run = train({**options, "judged": ["instruct_lima", "safety_cona"], "judged_rows": 3, "judged_max_new_tokens": 24})
    run_module("trace_bench", "evaluate", run.path)
    copy = shutil.copytree(run.path, tmp_path / "local" / "run")
    tokenizer = pieces_tokenizer()
    tokenizer.add_tokens("[[A]]")
    always = {"<0x0A>": "[[A]]", "[[A]]": "</s>"}
    model = make_writer(tmp_path / "judge", tokenizer, always, max_position_embeddings=8192)
    judge = ["trace_bench", "judge", "--sampling", '{"temperature": 0, "max_tokens": 48}']
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_module(
        *("vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "judge"),
        *("--host", "127.0.0.1", "--port", port, "--max-model-len", 4096, "--enforce-eager"),
    )
    served = [*judge, run.path, "--model", "judge", "--base-url", f"http://127.0.0.1:{port}/v1"]
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.is_alive() and time.monotonic() < deadline, "the server did not start"
                time.sleep(1)
        outputs = [run_module(*served, NO_PROXY="127.0.0.1") for _ in range(2)]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.join()
    outputs.append(run_module(*judge, copy, "--model", model, "--local"))
    assert " 0 failed" in outputs[0] and "nothing to judge: every suite is done" in outputs[1]

    found = []
    for folder in (run, Run.open(copy)):
        results = [read_json(f) for s in folder.stages for f in sorted((s.path / "judge").glob("*.json"))]
        assert len(results) == 4, "two suites at stage 0 and at the last"
        for result in results:
            counts = result["direct"]
            assert counts["n"] == 3 and not result["failed"]
            pairs = result.get("pairs")
            outcomes = ("win", "tie", "lose", "unscored", "broken")
            assert pairs is None or sum(pairs[k] for k in outcomes) == pairs["n"] == 3
        found.append([(r["suite"], r["requests"], r["prompt_tokens"], r.get("pairs")) for r in results])
    assert found[0] == found[1]
    report.write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "## Instruction following" in text and "## Safety" in text
