"""Kills and stops the commands at random moments and compares each resumed run with an uninterrupted one.

`python tests/kill_harness.py FOLDER [--kills 100] [--signals 30] [--seed 0] [--only train evaluate]` kills every
command at random file operations and moments, stops it by SIGINT and SIGTERM, and lets the disk run full. It ends after
this many kills and signals.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # equal bytes need a fixed number of threads, and threads do not survive forks
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import command_line, make_tiny_model, pieces_tokenizer
from judge_server import Server, judge
from tqdm import tqdm

from judges import judging
from trace_bench import cli, ending
from trace_bench import study as study_module
from trace_tasks import data
from trace_tasks.data.files import write_json
from trainers import base, ewc

ROOT = Path(__file__).parents[1]
#: The entries that may differ in otherwise equal files (a checkout may be edited meanwhile).
TIMES = {"commit", "seconds", "seconds_around_steps", "tokens_per_second", "peak_memory_bytes", "mean_loss"}
OPTIONS = {
    **{"data": "demo", "tasks": ["trace_fomc", "trace_numglue_ds"], "judged": ["instruct_lima"], "judged_rows": 3},
    **{"train_rows": 16, "test_rows": 3, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
    **{"max_prompt_length": 48, "max_new_tokens": 3, "judged_max_new_tokens": 4, "gradient_checkpointing": False},
    **{"use_peft": True, "lora_r": 2, "lora_dropout": 0.1, "backend": "hf", "disable_tqdm": True, "ewc_rows": 2},
    **{"save_strategy": "steps", "save_steps": 2, "seed": 7},
}


def ended(module: str, arguments: list[str]) -> int:
    """Does the work of `python -m MODULE ARGUMENTS` without its imports. Returns the exit code and prints errors."""
    try:
        if module == "trace_bench":
            cli.main(arguments)
        else:
            base.main(ewc.EWCTrainer, ewc.EWCConfig, arguments)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr, flush=True)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(words: list[str], environment: object = None) -> int:
    """`ending.run_child` in a fork, with the imports done."""
    pid = os.fork()
    if pid == 0:
        os.environ[ending._QUIET] = "1"
        os._exit(ended(words[2], words[3:]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Commands:
    """The commands of a run, in order, and their results."""

    def __init__(self, folder: Path, model: Path, url: str, only: list[str]) -> None:
        self.folder, self.run, self.out = folder, folder / "run", folder / "annotated"
        self.study, self.cache, self.temporary = folder / "study", folder / "cache", folder / "temporary"
        shared, options = folder.parent, {"model_name_or_path": str(model), **OPTIONS}
        if not (shared / "archive.zip").exists():
            shutil.make_archive(str(shared / "archive"), "zip", data.find_data("demo"))
            write_json(shared / "config.yaml", options)  # JSON is YAML
            write_json(shared / "study.yaml", {"config": "config.yaml", "runs": {"mine": {"method": "ewc"}}})
        asking = ["--model", "fake", "--base-url", url, "--concurrency", "2"]
        annotating = ["--data", "demo", "--tasks", "trace_fomc", "--rows", "6", "--attempts", "2"]
        words = {
            "data": ["trace_bench", "data", str(shared / "archive.zip")],
            "train": ["trainers.ewc", *command_line({**options, "output_dir": self.run})],
            "evaluate": ["trace_bench", "evaluate", str(self.run)],
            "judge": ["trace_bench", "judge", str(self.run), *asking],
            "annotate": ["trace_bench", "annotate", str(self.out), *asking, *annotating],
            "report": ["trace_bench", "report", str(self.run)],
            "study": ["trace_bench", "study", str(shared / "study.yaml"), "--output_dir", str(self.study)],
        }
        self.words = {name: words[name] for name in words if name in only}

    def finished(self) -> dict[Path, tuple[int, int]]:
        """The finished files, which must not be written again, each with a mark that changes if it is written again."""
        files = list(self.cache.glob("data-*/*/*"))
        for run in (self.run, *self.study.glob("*")):
            for trained in run.glob("stages/*/train.json"):
                files += [trained, *trained.parent.glob("adapter/*"), *trained.parent.glob("method_state/*")]
            for cell in run.glob("stages/*/eval/*.json"):
                files += [cell, cell.parent / "samples" / f"{cell.stem}.jsonl"]
            files += run.glob("stages/*/judge/*.json")
        return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}

    def leftovers(self) -> set[Path]:
        """Temporary files. A killed program leaves them to the next one; a stopped program removes them."""
        return {p for p in self.folder.rglob("*") if ".tmp" in p.name} | set(self.temporary.glob("*"))

    def replies(self) -> list[str]:
        """The keys of the paid replies, with repetitions."""
        found = []
        for cache in (judging.cache_file(self.folder), self.out / "annotate-cache.jsonl"):
            for line in cache.read_bytes().split(b"\n") if cache.exists() else ():
                with suppress(ValueError, KeyError):
                    found.append(json.loads(line)["key"])
        return sorted(found)

    def outcome(self) -> dict[str, Any]:
        """All results of the commands, without times."""
        found: dict[str, Any] = {}
        patterns = ("run/stages/**/*", "run/scores.csv", "study/*/stages/**/*", "annotated/**/*", "cache/data-*/*/*")
        for file in sorted(p for pattern in patterns for p in self.folder.glob(pattern) if p.is_file()):
            if file.name.startswith(".") or "annotate-cache" in file.name:
                continue
            content: Any = file.read_bytes()
            if file.suffix == ".json":
                content = json.loads(content, object_hook=lambda d: {k: v for k, v in d.items() if k not in TIMES})
            found[file.relative_to(self.folder).as_posix()] = content
        return found


def in_child(
    commands: Commands,
    name: str,
    *,
    at: int = 0,
    torn: int = 0,
    after: float = 60.0,
    number: int = signal.SIGKILL,
    limit: int = -1,
):
    """Runs a command in a fork.

    Args:
        commands: The commands. File operations below their folder are counted.
        name: The name of the command to run.
        at: Kill it at this file operation; 0 = do not.
        torn: The number of bytes to cut from the end of the file that is being written when it is killed.
        after: Send it a signal after this many seconds.
        number: The signal.
        limit: The longest file that it can write, as on a full disk; -1 = no limit.

    Returns:
        How it ended ("killed", "stopped", "done", "error"), its output, and the number of file operations.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # its children are killed, too, as by `kill -9 -PID` or a power cut
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        operations = count_operations(commands.folder, at, torn)
        # Forked processes share tqdm's lock: if one is killed while it holds the lock, all others hang.
        tqdm.set_lock(threading.RLock())
        if limit >= 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        # The unpacked archive and temporary files go to a known place.
        os.environ |= {"TRACE_CACHE": str(commands.cache)} if name == "data" else {}
        commands.temporary.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(commands.temporary)
        study_module.run_child = forked
        ending.watch()
        module, *arguments = commands.words[name]
        code = ended(module, arguments)
        print(f"\noperations {operations[0]}", flush=True)
        os._exit(code)
    with suppress(OSError):  # parent or child, whoever is first
        os.setpgid(pid, pid)
    os.close(write)
    deadline, output = time.monotonic() + after, b""
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.killpg(pid, number)
            number, deadline = signal.SIGKILL, time.monotonic() + 60
        elif part := os.read(read, 65536):
            output += part
        else:
            break
    os.close(read)
    _, status = os.waitpid(pid, 0)
    text = output.decode(errors="replace")
    counted = re.search(r"operations (\d+)", text)
    code = os.waitstatus_to_exitcode(status)
    how = "killed" if code < 0 else "done" if code == 0 else "stopped" if code > 128 else "error"
    return how, text, int(counted[1]) if counted else 0


def count_operations(folder: Path, at: int, torn: int) -> list[int]:
    """Counts this process's operations on files in a folder, and kills it at one of them."""
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


def one_round(
    commands: Commands, operations: dict[str, int], seconds: dict[str, float], rng: random.Random, many: dict[str, int]
) -> Counter[str]:
    """Makes each fault in each command a number of times, then lets it end. Returns the counts of outcomes."""
    counts: Counter[str] = Counter()
    for name in commands.words:
        left = operations[name]
        faults = [fault for fault, times in many.items() for _ in range(times)]
        rng.shuffle(faults)
        for fault in [*faults, "none"]:
            before, left_before = commands.finished(), commands.leftovers()
            whole = list(commands.run.glob("stages/*/.trainer/*/whole.json"))
            how_to: dict[str, Any] = {}
            if fault == "full":
                how_to = {"limit": rng.choice([0, 500, 5000])}
            elif fault == "kill" and rng.random() < 0.7:
                how_to = {"at": rng.randint(1, max(1, left // 2)), "torn": rng.choice([0, 1, 30])}
            elif fault != "none":
                how_to = {"after": rng.uniform(0, seconds[name] * 0.8)}
            if fault == "signal":
                how_to["number"] = rng.choice([signal.SIGINT, signal.SIGTERM])
            how, text, _ = in_child(commands, name, **how_to)
            while fault == "none" and how == "killed":  # on a busy machine its time limit kills it
                how, text, _ = in_child(commands, name)
            where, after = f"{name}, {fault} {how_to}: {how}\n{text}", commands.finished()
            again = [file for file, mark in before.items() if after.get(file) != mark]
            assert not again, f"done again: {again}\n{where}"
            assert "Traceback" not in text and "Exception ignored" not in text, where
            if name == "train" and whole and how == "done":
                assert "continues at step" in text or "already trained" in text, where
            counts["went on"] += "continues at step" in text
            if how == "killed":
                counts["kills"] += 1
                left = max(4, left - how_to.get("at", 0) // 2)
                shutil.rmtree(commands.temporary, ignore_errors=True)
            elif how == "stopped":
                assert fault == "signal" and len(re.findall("^stopped: .* To continue: ", text, re.M)) == 1, where
                assert commands.leftovers() <= left_before, f"{commands.leftovers()}\n{where}"
                counts["signals"] += 1
            elif how == "error":
                line = [x for x in text.splitlines() if x.startswith("error: ")]
                one = len(line) == 1 or (name == "study" and line)  # a study also shows the errors of its children
                assert fault == "full" and one, where
                assert all("run the command again" in x for x in line if "evaluation of" not in x), line
                counts["full disks"] += 1
            elif fault != "none":
                break
    return counts


# ------------------------------------------------------------------------------------------------------------ the whole


def serve() -> tuple[str, int]:
    """Starts a judge and teacher in a process of its own. Returns its address and process number."""
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
    """Checks that the results are those of an uninterrupted run, and removes them."""
    found = commands.outcome()
    different = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
    assert not different, f"{commands.folder.name}: {different}"
    assert commands.replies() == paid, "every reply is paid once"
    assert not list(commands.folder.rglob(".trainer")), "nothing temporary stays"
    shutil.rmtree(commands.folder)


def harness(folder: Path, kills: int, interruptions: int, seed: int, only: list[str]) -> dict[str, int]:
    """Kills the commands and sends them signals, this many times. Returns the counts."""
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
        while counts["kills"] < kills or counts["signals"] < interruptions:
            rounds += 1
            commands = Commands(folder / f"round{rounds}", model, url, only)
            left = {"kill": kills - counts["kills"], "signal": interruptions - counts["signals"]}
            many = {what: 4 if number > 20 else int(number > 0) for what, number in left.items()}
            counts += one_round(commands, operations, seconds, rng, {"full": 1, **many})
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
