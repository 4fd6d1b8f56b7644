"""(d) A stage that is killed on the GPU and resumed ends with the result of an undisturbed stage.

It should give the same bytes. If it does not, a second undisturbed run shows whether training on this card always gives
the same bytes. Some kernels add in no fixed order; then the losses must be the same up to rounding.

    python -m bench.gpu.resume FOLDER [--tiny]      # the training that is killed
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.shapes import comparison
from bench.gpu.small import TOLERANCE, largest_difference, options
from trace_tasks.data.files import sha256

TITLE = "a killed stage goes on"
LIMIT = 60
#: The first two are enough if they give the same bytes.
RUNS = ("undisturbed", "killed", "again")
ITEMS = dict.fromkeys(RUNS, ("trl", "datasets", "lm-eval"))
IMPORTS = ("trainers.base",)


def steps(tiny: bool) -> tuple[int, int]:
    """The steps of a stage, and those from one checkpoint to the next."""
    return (10, 2) if tiny else (40, 5)


def measure(item: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """The bytes and losses of the second stage, and the step at which it was resumed."""
    from trace_bench.run import read_json

    path = folder / f"run-{item}"
    shutil.rmtree(path, ignore_errors=True)
    killed_at = _killed(path, tiny) if item == "killed" else None
    stage = train(path, tiny).stages[2]
    return {
        "adapter": sha256(stage.path / "adapter" / "adapter_model.safetensors")[:16],
        "losses": [entry["loss"] for entry in read_json(stage.train_file)["losses"]],
        **({} if killed_at is None else {"killed_at_step": killed_at}),
    }


def train(path: Path, tiny: bool) -> Any:
    """Trains the run, or the rest of it."""
    from trainers.base import CLTrainer
    from trainers.base import train as train_run

    many, saved = steps(tiny)
    config, model = options(path, "bfloat16", save_strategy="steps", save_steps=saved, train_sampling_strategy="random")
    config.max_steps = many
    model.lora_dropout = 0.1  # random numbers must be resumed, too
    return train_run(CLTrainer, config, model)


def _killed(path: Path, tiny: bool) -> int:
    """Trains in a child process, kills it when stage 2 has two checkpoints, and returns the step of the last one."""
    process = subprocess.Popen([sys.executable, "-m", "bench.gpu.resume", str(path), *(["--tiny"] if tiny else [])])
    while _saved_step(path) < 2 * steps(tiny)[1]:
        if process.poll() is not None:
            sys.exit(f"the training ended (exit code {process.returncode}) before it could be killed")
        time.sleep(0.002)
    process.kill()
    process.wait()
    if list(path.glob("stages/2_*/train.json")):
        sys.exit("the training was faster than the kill")
    return _saved_step(path)


def _saved_step(path: Path) -> int:
    """The step of stage 2's last complete checkpoint; 0 if there is none. Older ones are removed in the training."""
    found = path.glob("stages/2_*/.trainer/checkpoint-*/whole.json")
    return max((int(file.parent.name.rpartition("-")[2]) for file in found), default=0)


def goals(done: dict[str, Any]) -> dict[str, Any]:
    """The same bytes, unless two undisturbed runs on this card differ; then the same losses."""
    if not {"undisturbed", "killed"} <= set(done):
        return {}
    plain, killed, again = (done.get(item) for item in ("undisturbed", "killed", "again"))
    if plain["adapter"] == killed["adapter"]:
        return {"same bytes as undisturbed": comparison(True, True, True)}
    if again is None:
        return {}
    if plain["adapter"] == again["adapter"]:
        return {"same bytes as undisturbed (two such runs have them)": comparison(False, True, False)}
    off = largest_difference(plain["losses"], killed["losses"])
    most = TOLERANCE["bfloat16"]
    title = "largest difference of a step's loss, as a share (two undisturbed runs differ, too)"
    return {title: comparison(off, most, off <= most)}


if __name__ == "__main__":
    train(Path(sys.argv[1]), "--tiny" in sys.argv)
