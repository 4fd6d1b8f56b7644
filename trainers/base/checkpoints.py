"""What a stage leaves on the disk: its checkpoint, the state of its method, and checkpoints within the stage."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import time
from collections.abc import Container, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from trace_bench.run import Run, RunError, Stage, read_json
from trace_tasks.data.files import fingerprint, fresh_dir, remove, sync_files, write_json
from trainers.base.config import ConfigError
from trainers.base.gradients import GradientTrainer
from trainers.base.sampler import LengthGrouped

log = logging.getLogger(__name__)

#: Files of a checkpoint within a stage: the trained parameters, the method's tensors, and what is written last.
_TRAINED, _KEPT, _WHOLE = "trained.safetensors", "kept.safetensors", "whole.json"


class CheckpointTrainer(GradientTrainer):
    """A trainer that saves its stage, and goes on within it after a kill."""

    #: What is counted during a stage and so has to be kept in its checkpoints, in addition to what HF keeps.
    counters: ClassVar[tuple[str, ...]] = ("_total_train_tokens",)
    #: Tensors that change during a stage, such as an average of the weights: they are in its checkpoints, too. A
    #: method puts them here in `begin_stage`, and reads and changes them here.
    kept: dict[str, torch.Tensor]
    run: Run
    stage: Stage
    #: Before the checkpoint that the stage goes on from: seconds, steps and the sum of their losses as far as they were
    #: logged, and that of the steps since.
    _before: dict[str, float]
    #: The order of the rows where they are grouped by length: it has to know which epoch a stage goes on in.
    grouped: LengthGrouped | None = None
    #: When the stage began, as `time.perf_counter` counts; what was done before a kill is subtracted.
    _started: float

    @property
    def previous(self) -> Stage:
        """The stage before; the base model is stage 0."""
        return self.run.stages[self.stage.index - 1]

    # ------------------------------------------------------------------------------------------------ after the stage

    def check_saved(self) -> None:
        """Refuses a model of which parameters are trained that `save_checkpoint` does not save; a method's own one may.

        Raises:
            ConfigError: naming one of them.
        """
        trains = self.run.manifest.get("trains")
        if type(self).save_checkpoint is not CheckpointTrainer.save_checkpoint or trains not in ("lora", "full"):
            return
        if trains == "lora":
            saved = {t.data_ptr() for t in get_peft_model_state_dict(self.model, save_embedding_layers=False).values()}
            lost = [name for name, p in self.trained().items() if p.data_ptr() not in saved]
        elif self.config.deepspeed_plugin is None:  # which makes shards of a model wherever it is made
            with torch.device("meta"):
                known = dict(type(self.model)(copy.deepcopy(self.model.config)).named_parameters())
            lost = [name for name in self.trained() if name not in known]
        else:
            lost = []
        if lost:
            raise ConfigError(
                f"{len(lost)} parameters are trained that the checkpoint of a stage does not hold, such as {lost[0]}: "
                "the next stage and the evaluation would be without them. Freeze them; name modules that are trained "
                "beside an adapter in lora_modules_to_save; or have the method's save_checkpoint write them."
            )

    def save_checkpoint(self) -> Path:
        """Saves the stage's adapter or model, whole or not at all, and returns its folder."""
        target = self.stage.path / ("adapter" if self.model_args.use_peft else "model")
        # All processes take part in gathering the weights; the first one writes, and says where.
        with fresh_dir(target) if self.is_world_process_zero() else nullcontext(target) as folder:
            (place,) = broadcast_object_list([str(folder)])
            self.save_model(place)
            if self.is_world_process_zero():
                if not list(folder.glob("*.safetensors")):
                    raise RunError(
                        f"{target} would hold no weights: DeepSpeed or FSDP saved shards. Launch with a file of "
                        "trainers/configs/accelerate, which have them put together."
                    )
                # A pickle of the arguments: nobody reads it, and only safetensors are kept.
                (folder / "training_args.bin").unlink(missing_ok=True)
                if self.model_args.use_peft:
                    sort_names(folder, self.accelerator.unwrap_model(self.model).peft_config["default"])
        return target

    def save_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Writes what the next stage needs to stage.method_state; for `end_stage`."""
        if self.is_world_process_zero():
            with fresh_dir(self.stage.method_state) as folder:
                save_tensors(tensors, folder / "state.safetensors")

    def load_state(self, on_cpu: Container[str] = ()) -> dict[str, torch.Tensor]:
        """What `save_state` wrote at the stage before, on the device but for `on_cpu`; empty at the first stage."""
        if self.stage.index == 1:
            return {}
        file = self.previous.method_state / "state.safetensors"
        if not file.is_file():
            raise RunError(
                f"{file} is gone: stage {self.stage.name} cannot be trained without it. Train the stage before again "
                "(delete its train.json), or restore the file."
            )
        device = self.config.device  # `stage_dataset` may ask, when there is no accelerator yet
        return {name: tensor if name in on_cpu else tensor.to(device) for name, tensor in load_file(file).items()}

    # ----------------------------------------------------------------------------------------------- within the stage

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """HF's; but in a checkpoint within the stage the trained parameters, as the method has them in memory."""
        if not _internal_call or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.trained(), folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The counterpart of `save_model`; called by HF's trainer."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint) / _TRAINED)
        for name, parameter in self.trained().items():
            parameter.data.copy_(saved[name])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """HF's checkpoint, and last of all the file that says that it is whole; then older ones go.

        HF also writes pickles. It reads them with weights_only, which runs no code; training_args.bin it never reads.
        """
        if self.state.global_step >= self.state.max_steps and self.state.epoch and self.state.epoch % 1:
            return  # HF, going on within an epoch, looks at the number of steps only after one more of them
        folder = self.stage.attempt / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            remove(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        unlogged = self.accelerator.gather(self._tr_loss).mean().item()
        if self.is_world_process_zero():
            if self.kept:
                save_tensors(self.kept, folder / _KEPT)
            sync_files(folder)
            whole = {
                "of": self._origin(),
                "method_source": method_source(type(self)),
                "step": self.state.global_step,
                "seconds": time.perf_counter() - self._started,
                "losses": self._before["losses"] + self._total_loss_scalar,
                "unlogged": unlogged,
                "unlogged_steps": self.state.global_step - self._globalstep_last_logged,
                "counters": {name: getattr(self, name) for name in self.counters},
                "files": _sizes(folder),
            }
            write_json(folder / _WHOLE, whole)
            rotate_checkpoints(str(self.stage.attempt), self.config.save_total_limit)

    def _origin(self) -> dict[str, Any]:
        """What a checkpoint within the stage has to share with an attempt that goes on from it."""
        before = self.previous.train_file
        return {
            "run": self.run.identity,
            "stage before": fingerprint(before) if before.exists() else None,
            "processes": self.args.world_size,
        }

    def resume(self) -> str | None:
        """The newest whole checkpoint of this very stage, its counts taken over; None = from the beginning.

        Raises:
            ConfigError: if a counter is no number, with which no checkpoint could be gone on from.
        """
        for name in self.counters:
            if not isinstance(value := getattr(self, name, 0), int | float):
                raise ConfigError(
                    f"counters has {name}, which is a {type(value).__name__}: name numbers (int or float). "
                    "Tensors that change within a stage belong into kept."
                )
        # The first process decides: on a shared file system the others may not see yet what is there.
        (there,) = broadcast_object_list([sort_checkpoints(str(self.stage.attempt))])
        for folder in map(Path, reversed(there)):
            if whole := self._whole(folder):
                for name, value in whole["counters"].items():
                    setattr(self, name, value)
                if (folder / _KEPT).exists():
                    tensors = load_file(folder / _KEPT)
                    self.kept = {name: tensor.to(self.accelerator.device) for name, tensor in tensors.items()}
                if whole.get("method_source") not in (None, method_source(type(self))):
                    log.warning(
                        "The file of the method has changed since step %d of stage %s, which would mix two methods. "
                        "For a clean one remove %s.",
                        whole["step"],
                        self.stage.name,
                        self.stage.attempt,
                    )
                self._before = {name: whole.get(name, 0) for name in self._before}  # older programs had not all of them
                self._started -= whole["seconds"]
                return str(folder)
            if self.is_world_process_zero():
                remove(folder)  # else it would count as the newest when older ones are removed
        return None

    def _whole(self, folder: Path) -> dict[str, Any] | None:
        """What a checkpoint within the stage says of itself; None = it cannot be gone on from."""
        try:
            whole = read_json(folder / _WHOLE)
            usable = whole["of"] == self._origin() and whole["files"] == _sizes(folder)
        except (OSError, RunError):
            usable = False  # it was being written when the program was killed
        (answer,) = broadcast_object_list([whole if usable else None])
        return answer


def method_source(trainer: type) -> str | None:
    """The fingerprint of a method's file; None where there is no file, as in a notebook."""
    try:
        file = Path(inspect.getfile(trainer))
    except (OSError, TypeError):
        return None
    if file.parent == Path(__file__).parent:  # sequential training is all that is in this folder
        return fingerprint(file.parent, [f.name for f in file.parent.glob("*.py")])
    return fingerprint(file)


def plain(value: Any) -> Any:
    """What a method records, as JSON holds it: tensors and arrays as lists of numbers, NaN as null, others as texts.

    The stage is trained when its record is written, and must not be lost for it.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in folder.iterdir() if p.name != _WHOLE}


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes tensors to a safetensors file."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)


def sort_names(folder: Path, config: Any) -> None:
    """Sorts the names in the adapter_config.json of a folder that PEFT's `config` keeps in sets, in no fixed order."""
    file = folder / "adapter_config.json"
    names = {key: sorted(value) for key, value in vars(config).items() if isinstance(value, set)}
    file.write_text(json.dumps({**read_json(file), **names}, indent=2, sort_keys=True), encoding="utf-8")
