"""The work of the processes in `tests/test_distributed.py`: several trainings, one after the other.

A job has a method and the options of a run. It may say where the second process dies: {"stage": 2, "at": "step"}, which
is step 1 by default. "alone" is a number of seconds: the first process works alone for this time instead of each
evaluation and of each check of a stage's inputs. Elsewhere the processes wait for each other only for a shorter time.
"""

import hashlib
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from conftest import train
from forks import Child
from method_runs import method

from trainers.base import answering, stages, writing


def watched(trainer: type, kill: dict | None) -> type:
    """The same method, but its processes must agree to the last bit, and one of them may die."""

    class Watched(trainer):
        def dies(self, at: str) -> None:
            step = (kill or {}).get("step", 1)
            here = self.stage.index, at, step if at == "save" else self.state.global_step
            if kill and here == (kill["stage"], kill["at"], step) and self.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        def begin_stage(self):
            super().begin_stage()
            self.began_with = {name: p.detach().clone() for name, p in self.trained().items()}

        def record(self):
            return super().record() | {"moved": self.moved}

        def adjust_gradients(self, model):
            super().adjust_gradients(model)
            self.dies("step")

        def save_checkpoint(self):
            digest = hashlib.sha256()
            self.moved = float(sum((p - self.began_with[n]).square().sum() for n, p in self.trained().items()).sqrt())
            for name, parameter in self.trained().items():
                digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
            digests = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(digests, digest.hexdigest())
            assert len(digests) == 2 and len(set(digests)) == 1, f"{self.stage.name}: the processes have drifted apart"
            self.dies("save")
            return super().save_checkpoint()

    Watched.__module__ = trainer.__module__  # for the manifest it is the same method
    return Watched


def write_alone(words: list[str]) -> int:
    """`writing.run_alone` as a fork, with the imports done."""

    def write() -> None:
        for name in [name for name in os.environ if name.startswith(writing.LAUNCHER_VARIABLES)]:
            del os.environ[name]
        AcceleratorState._reset_state(reset_partial_state=True)
        answering.answer(Path(words[1]))

    return Child(write).wait()


def train_jobs(jobs: list[dict]) -> None:
    """Trains the jobs as one of two processes."""
    writing.run_alone = write_alone
    for job in jobs:
        trainer, config = method(job["method"])
        if seconds := job.get("alone"):
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=0.75 * seconds))
            stages.run_alone = lambda words, seconds=seconds: time.sleep(seconds)
            stages.checks.verify = lambda *args, seconds=seconds: time.sleep(seconds)
        train(job["options"], watched(trainer, job.get("kill")), config)
