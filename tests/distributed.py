"""What the processes of `tests/test_distributed.py` do: one training after the other, all in the same processes.

A job has a method, the options of a run, and perhaps where the second process dies: {"stage": 2, "at": "step"}, at its
step 1 unless it says which. With "alone" the first process is at work alone for so many seconds in place of each
evaluation and of each check of what a stage is made from, and otherwise processes wait for each other for less than
that.
"""

import hashlib
import os
import signal
import time
from datetime import timedelta

import torch
from conftest import train
from test_methods import method

from trainers.base import stages


def watched(trainer: type, kill: dict | None) -> type:
    """The same method; its processes have to agree to the last bit, and one of them may die."""

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

    Watched.__module__ = trainer.__module__  # the same method as far as the manifest goes
    return Watched


def train_jobs(jobs: list[dict]) -> None:
    """Does the jobs as one of two processes."""
    for job in jobs:
        trainer, config = method(job["method"])
        if seconds := job.get("alone"):
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=0.75 * seconds))
            stages.run_alone = lambda words, seconds=seconds: time.sleep(seconds)
            stages.checks.verify = lambda *args, seconds=seconds: time.sleep(seconds)
        train(job["options"], watched(trainer, job.get("kill")), config)
