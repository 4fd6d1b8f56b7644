"""Kills and stops the commands at random moments and compares each resumed run with an uninterrupted one.

`python tests/kill_harness.py FOLDER [--kills 100] [--signals 30] [--seed 0] [--only train evaluate]` kills every
command at random file operations and moments until that many kills, with full disks in between, then sends that many
signals (SIGINT, SIGTERM and SIGKILL) to processes of the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bitwise equality is promised for one number of threads, and threads do not survive forks
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import command_line, make_tiny_model, pieces_tokenizer
from judge_server import Server, judge
from tqdm import tqdm

from judges import judging
from trace_bench import cli
from trace_bench import study as study_module
from trace_tasks import data
from trace_tasks.data.files import write_json
from trainers import base, ewc

ROOT = Path(__file__).parents[1]
#: What differs from time to time in files that are otherwise the same (a checkout may be edited meanwhile).
TIMES = {"commit", "seconds", "seconds_around_steps", "tokens_per_second", "peak_memory_bytes", "mean_loss"}
OPTIONS = {
    **{"data": "demo", "tasks": ["trace_fomc", "trace_numglue_ds"], "judged": ["instruct_lima"], "judged_rows": 3},
    **{"train_rows": 16, "test_rows": 3, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
    **{"max_prompt_length": 48, "max_new_tokens": 3, "judged_max_new_tokens": 4, "gradient_checkpointing": False},
    **{"use_peft": True, "lora_r": 2, "lora_dropout": 0.1, "backend": "hf", "disable_tqdm": True, "ewc_rows": 2},
    **{"save_strategy": "steps", "save_steps": 2, "seed": 7},
}


def call(module: str, arguments: list[str]) -> None:
    """What `python -m MODULE ARGUMENTS` does, without its imports."""
    if module == "trace_bench.cli":
        cli.main(arguments)
    else:
        base.main(ewc.EWCTrainer, ewc.EWCConfig, arguments)


def ended(module: str, arguments: list[str]) -> int:
    """`call` as a program: its exit code, with what went wrong on standard error."""
    try:
        call(module, arguments)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr, flush=True)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(words: list[str], environment: object = None) -> int:
    """`ending.run_child` in a fork, which has its imports already."""
    pid = os.fork()
    if pid == 0:
        os._exit(ended(words[2], words[3:]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Commands:
    """The commands of a run, in the order in which they are given, and what they leave."""

    def __init__(self, folder: Path, model: Path, url: str, only: list[str]) -> None:
        self.folder, self.run, self.out = folder, folder / "run", folder / "annotated"
        self.study, self.cache = folder / "study", folder / "cache"
        shared, options = folder.parent, {"model_name_or_path": str(model), **OPTIONS}
        if not (shared / "archive.zip").exists():
            shutil.make_archive(str(shared / "archive"), "zip", data.find_data("demo"))
            write_json(shared / "config.yaml", options)  # JSON is YAML
            write_json(shared / "study.yaml", {"config": "config.yaml", "runs": {"mine": {"method": "ewc"}}})
        asking = ["--model", "fake", "--base-url", url, "--concurrency", "2"]
        annotating = ["--data", "demo", "--tasks", "trace_fomc", "--rows", "6", "--attempts", "2"]
        words = {
            "data": ["trace_bench.cli", "data", str(shared / "archive.zip")],
            "train": ["trainers.ewc", *command_line({**options, "output_dir": self.run})],
            "evaluate": ["trace_bench.cli", "evaluate", str(self.run)],
            "judge": ["trace_bench.cli", "judge", str(self.run), *asking],
            "annotate": ["trace_bench.cli", "annotate", str(self.out), *asking, *annotating],
            "report": ["trace_bench.cli", "report", str(self.run)],
            "study": ["trace_bench.cli", "study", str(shared / "study.yaml"), "--output_dir", str(self.study)],
        }
        self.words = {name: words[name] for name in words if name in only}

    def environment(self, name: str) -> dict[str, str]:
        """What makes the unpacked archive, and temporary files of the system's folder, be found again."""
        cache = {"TRACE_CACHE": str(self.cache)} if name == "data" else {}
        return {"TMPDIR": str(self.folder / "temporary"), **cache}

    def finished(self) -> dict[Path, tuple[int, int]]:
        """What is done and may not be done again: files with what tells one writing of them from another."""
        files = list(self.cache.glob("data-*/*/*"))
        for run in (self.run, *self.study.glob("*")):
            for trained in run.glob("stages/*/train.json"):
                files += [trained, *trained.parent.glob("adapter/*"), *trained.parent.glob("method_state/*")]
            for cell in run.glob("stages/*/eval/*.json"):
                files += [cell, cell.parent / "samples" / f"{cell.stem}.jsonl"]
            files += run.glob("stages/*/judge/*.json")
        return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}

    def done_again(self, before: dict[Path, tuple[int, int]]) -> list[Path]:
        """The files that were finished before and have been written since."""
        after = self.finished()
        return [file for file, mark in before.items() if after.get(file) != mark]

    def replies(self) -> list[str]:
        """The keys of the replies that were paid, as often as they are in a cache."""
        found = []
        for cache in (judging.cache_file(self.folder), self.out / "annotate-cache.jsonl"):
            for line in cache.read_bytes().split(b"\n") if cache.exists() else ():
                with suppress(ValueError, KeyError):
                    found.append(json.loads(line)["key"])
        return sorted(found)

    def outcome(self) -> dict[str, Any]:
        """All that the commands come to, without times."""
        found: dict[str, Any] = {}
        patterns = ("run/stages/**/*", "run/scores.csv", "study/*/stages/**/*", "annotated/**/*", "cache/data-*/*/*")
        for file in sorted(p for pattern in patterns for p in self.folder.glob(pattern) if p.is_file()):
            if file.name.startswith(".") or "annotate-cache" in file.name:
                continue
            content: Any = file.read_bytes()
            if file.suffix == ".json":
                content = json.loads(content)
                content = {k: v for k, v in content.items() if k not in TIMES} if type(content) is dict else content
            found[file.relative_to(self.folder).as_posix()] = content
        return found


def in_child(commands: Commands, name: str, *, at: int = 0, torn: int = 0, after: float = 60.0, limit: int = -1):
    """Runs a command in a fork.

    Args:
        commands: The commands, below whose folder file operations are counted.
        name: The one to run.
        at: Kill it at this file operation; 0 = at none.
        torn: Bytes cut from the end of the file that is being written when it is killed.
        after: Kill it after so many seconds.
        limit: The longest file that can be written, as on a full disk; -1 = any.

    Returns:
        How it ended ("killed", "done", "error"), its output, and the number of file operations.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()  # killed with its children, as `kill -9 -PID` and a machine that goes off do
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        operations = count_operations(commands.folder, at, torn)
        # tqdm's lock is shared with forked processes: one that is killed while it has it would stop all others.
        tqdm.set_lock(threading.RLock())
        if limit >= 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        os.environ |= commands.environment(name)
        study_module.run_child = forked
        module, *arguments = commands.words[name]
        code = ended(module, arguments)
        print(f"\noperations {operations[0]}", flush=True)
        os._exit(code)
    os.close(write)
    deadline, output = time.monotonic() + after, b""
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.killpg(pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
        elif part := os.read(read, 65536):
            output += part
        else:
            break
    os.close(read)
    _, status = os.waitpid(pid, 0)
    text = output.decode(errors="replace")
    counted = re.search(r"operations (\d+)", text)
    how = "killed" if os.WIFSIGNALED(status) else "error" if os.WEXITSTATUS(status) else "done"
    return how, text, int(counted[1]) if counted else 0


def count_operations(folder: Path, at: int, torn: int) -> list[int]:
    """Counts the operations of this process on files in a folder, and kills it at one of them."""
    count = [0]

    def operation(fd: int | None = None) -> None:
        count[0] += 1
        if count[0] == at:
            if fd is not None and torn:
                os.truncate(f"/proc/self/fd/{fd}", max(0, os.fstat(fd).st_size - torn))
            os.killpg(0, signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(path, str):
                return
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        path = os.fspath(args[0])
        if isinstance(path, str) and (not path.startswith("/") or path.startswith(str(folder))):
            operation()

    sync = os.fsync

    def fsync(fd: int) -> None:
        operation(fd if not os.path.isdir(f"/proc/self/fd/{fd}") else None)
        sync(fd)

    os.fsync = fsync
    sys.addaudithook(hook)
    return count


def kill_round(
    commands: Commands, operations: dict[str, int], seconds: dict[str, float], rng: random.Random, many: int
) -> dict[str, Counter]:
    """Kills each command some times, gives it a full disk once, and lets it end; what came of it."""
    counts = {name: Counter() for name in ("kills", "full disks", "went on")}
    for name in commands.words:
        left = operations[name]
        faults = ["full", *["kill"] * (many * 2 if name == "train" else many)]
        rng.shuffle(faults)
        for fault in [*faults, "none"]:
            before, whole = commands.finished(), list(commands.run.glob("stages/*/.trainer/*/whole.json"))
            how_to: dict[str, Any] = {}
            if fault == "full":
                how_to = {"limit": rng.choice([0, 500, 5000])}
            elif fault == "kill" and rng.random() < 0.7:
                how_to = {"at": rng.randint(1, max(1, left // 2)), "torn": rng.choice([0, 1, 30])}
            elif fault == "kill":
                how_to = {"after": rng.uniform(0, seconds[name] * 0.8)}
            how, text, _ = in_child(commands, name, **how_to)
            while fault == "none" and how == "killed":  # by its limit of time, on a busy machine
                how, text, _ = in_child(commands, name)
            again = commands.done_again(before)
            assert not again, f"{name}, {fault} {how_to}: done again: {again}\n{text}"
            if name == "train" and whole and how == "done":
                assert "goes on at step" in text or "trained already" in text, text
            counts["went on"][name] += "goes on at step" in text
            if how == "killed":
                counts["kills"][name] += 1
                left = max(4, left - how_to.get("at", 0) // 2)
            elif how == "error":
                line = [x for x in text.splitlines() if x.startswith("error: ")]
                clear = len(line) == 1 or (name == "study" and line)  # a study has its children's, and goes on
                assert fault == "full" and clear and "Traceback" not in text, f"{name} {how_to}\n{text}"
                assert all("run the command again" in x for x in line if "evaluation of" not in x), line
                counts["full disks"][name] += 1
            elif fault != "none":
                break
    return counts


# -------------------------------------------------------------------------------------------------------------- signals


def interrupted_process(command: str, environment: dict[str, str], number: int, delay: float) -> tuple[int, str]:
    """Runs a command line in a shell and sends it a signal, Ctrl-C to its children as well: exit code and output."""
    process = subprocess.Popen(
        f"exec {command}",
        shell=True,
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    caught = re.compile(r"SigCgt:\s*(\w+)")
    while process.poll() is None:  # until it listens: before that nothing of ours has begun
        with suppress(FileNotFoundError, ProcessLookupError):
            found = caught.search(Path(f"/proc/{process.pid}/status").read_text())
            if found and int(found[1], 16) >> (signal.SIGTERM - 1) & 1:
                break
        time.sleep(0.002)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    try:
        text = process.communicate(timeout=60)[0]
        return process.returncode, text
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def signal_round(commands: Commands, seconds: dict[str, float], rng: random.Random) -> Counter:
    """Interrupts each command once by a signal, and goes on with the command that it says; which signals came."""
    came: Counter[str] = Counter()
    temporary = commands.folder / "temporary"
    temporary.mkdir(parents=True)
    for name, words in commands.words.items():
        command = shlex.join([sys.executable, "-m", *words])
        for number in (rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]), None):
            before, delay = commands.finished(), rng.uniform(0, seconds[name]) if number else 300
            code, text = interrupted_process(command, commands.environment(name), number or 0, delay)
            where = f"{name}, {number!r} after {delay:.2f} s: {code}\n{text}"
            again = commands.done_again(before)
            assert not again, f"done again: {again}\n{where}"
            assert "Traceback" not in text and "Exception ignored" not in text, where
            if number is None:
                assert code == 0, where
            elif code == -number:  # killed, or while Python was ending
                came[number.name] += number == signal.SIGKILL
                if number == signal.SIGKILL:
                    shutil.rmtree(temporary)
                    temporary.mkdir()
            elif code:
                lines = [line for line in text.splitlines() if line.startswith("stopped: ")]
                assert code == 128 + number and len(lines) == 1, where
                left = [p for p in commands.folder.rglob("*") if ".tmp" in p.name] + list(temporary.iterdir())
                assert not left, f"{left}\n{where}"
                command = lines[0].partition("Go on with: ")[2]
                came[number.name] += 1
    return came


# ------------------------------------------------------------------------------------------------------------ the whole


def serve() -> tuple[str, int]:
    """A judge and teacher in a process of its own: its address and number."""
    from judges.prompts import neutralise
    from trace_tasks.data import demo

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        rows = [row for splits in demo.make_reasoning().values() for row in splits["train"]]
        right = {neutralise(row["prompt"]): row["answer"] for row in rows}

        def answer(text: str) -> str:
            task = text.rpartition("<<<TASK>>>\n")[2].partition("\n<<<END OF TASK>>>")[0]
            return right.get(task, "") if "<<<TASK>>>" in text else judge(text)

        with Server(answer) as server:
            os.write(write, server.url.encode())
            signal.pause()
        os._exit(0)
    return os.read(read, 200).decode(), pid


def compare(commands: Commands, expected: dict[str, Any], paid: list[str]) -> None:
    """Makes sure that all is as it is without interruptions, and removes it."""
    found = commands.outcome()
    different = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
    assert not different, f"{commands.folder.name}: {different}"
    assert commands.replies() == paid, "every reply is paid once"
    assert not list(commands.folder.rglob(".trainer")), "nothing temporary stays"
    shutil.rmtree(commands.folder)


def harness(folder: Path, kills: int, interruptions: int, seed: int, only: list[str]) -> dict[str, int]:
    """Kills the commands that many times and sends them that many signals; what it counted."""
    torch.set_num_threads(1)
    environment = {"TRACE_CACHE": str(folder / "cache"), "TRACE_DATA": "demo", "HF_HUB_OFFLINE": "1"}
    os.environ |= {**environment, "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "none", "TQDM_DISABLE": "1"}
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        os.environ.pop(name, None)
    model = make_tiny_model(folder / "tiny", pieces_tokenizer())
    import lm_eval.models.huggingface  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import openai.resources.chat  # noqa: F401

    rng, counts, rounds = random.Random(seed), Counter(), 0
    url, server = serve()
    try:
        reference = Commands(folder / "reference", model, url, only)
        operations, seconds = {}, {}
        for name in reference.words:
            started = time.monotonic()
            how, text, operations[name] = in_child(reference, name)
            assert how == "done", text
            seconds[name] = time.monotonic() - started
        print("file operations:", operations, "seconds:", {k: round(v, 1) for k, v in seconds.items()}, flush=True)
        expected, paid = reference.outcome(), reference.replies()
        assert len(paid) == len(set(paid)) and bool(paid) == ("judge" in only or "annotate" in only)
        while counts["kills"] < kills:
            rounds += 1
            commands = Commands(folder / f"round{rounds}", model, url, only)
            for what, number in kill_round(commands, operations, seconds, rng, many=4 if kills > 20 else 1).items():
                counts[what] += number.total()
            compare(commands, expected, paid)
        started = time.monotonic()
        if interruptions:
            subprocess.run([sys.executable, "-c", "import trainers.base"], cwd=ROOT, check=True)
        imports = time.monotonic() - started
        longest = {name: took + imports for name, took in seconds.items()}
        longest |= {"data": 0.5, "judge": 2.0, "annotate": 2.0, "study": seconds.get("study", 0) + 2 * imports}
        while counts["signals"] < interruptions:
            rounds += 1
            commands = Commands(folder / f"round{rounds}", model, url, only)
            counts["signals"] += signal_round(commands, longest, rng).total()
            compare(commands, expected, paid)
        return dict(counts)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signals", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    every = ["data", "train", "evaluate", "judge", "annotate", "report", "study"]
    parser.add_argument("--only", nargs="+", default=every, choices=every)
    given = parser.parse_args()
    print(json.dumps(harness(given.folder, given.kills, given.signals, given.seed, given.only)))
