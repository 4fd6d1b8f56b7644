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
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from trace_bench.run import Run, RunError, Stage, read_json
from trace_bench.versions import code_digest
from trace_tasks.data.files import fingerprint, fresh_dir, remove, sync_files, write_json
from trainers.base.config import ConfigError
from trainers.base.gradients import GradientTrainer
from trainers.base.sampler import LengthGrouped

log = logging.getLogger(__name__)

#: Files of a checkpoint within a stage: trained parameters, the method's tensors, and a record that is written last.
_TRAINED, _KEPT, _WHOLE = "trained.safetensors", "kept.safetensors", "whole.json"
#: How many rows `as_trained` reads, and the most tokens of each part of them.
_ROWS, _TOKENS = 8, 32


class CheckpointTrainer(GradientTrainer):
    """A trainer that saves its stage, and can resume within it after a kill."""

    #: Attributes that count something during a stage. They are saved in its checkpoints, in addition to HF's own and
    #: to those of the classes that a method extends.
    counters: ClassVar[tuple[str, ...]] = ("_total_train_tokens",)
    #: The method's tensors that change during a stage, such as an average of the weights; saved in its checkpoints.
    #: A method creates them in `begin_stage`, and reads them from here only: `resume` replaces them.
    kept: dict[str, torch.Tensor]
    #: Whether a method's own `save_checkpoint` saves the model in memory, in a different form (`as_trained`).
    saves_same_model: ClassVar[bool] = False
    run: Run
    stage: Stage
    #: State of the checkpoint that the stage resumed from, 0 for a fresh start: seconds, step, the sum of the logged
    #: losses, and the sum and number of those not logged yet.
    _resumed_from: dict[str, float]
    #: The sampler that groups rows by length. It has to be told the epoch in which a stage resumes.
    grouped: LengthGrouped | None = None
    #: The start of the stage in `time.perf_counter` seconds, moved back by the time spent before a kill.
    _started: float

    @property
    def previous(self) -> Stage:
        """The stage before; the base model is stage 0."""
        return self.run.stages[self.stage.index - 1]

    # ------------------------------------------------------------------------------------------------ after the stage

    def check_saved(self) -> None:
        """Refuses trained parameters that `save_checkpoint` does not save. A method's own `save_checkpoint` is trusted.

        Raises:
            ConfigError: naming one of them; or if nothing is trained, or there is no adapter to save.
        """
        if not self.trained():
            raise ConfigError(
                "stage_model returned a model without trained parameters. Return one from trainable_model, or set "
                "requires_grad of what is trained."
            )
        trains = self.run.manifest.get("trains")
        if type(self).save_checkpoint is not CheckpointTrainer.save_checkpoint or trains not in ("lora", "full"):
            return
        lost = []
        if trains == "lora":
            if not isinstance(self.model, PeftModel):
                raise ConfigError(
                    "stage_model returned a model without an adapter, but use_peft=true. Return one with an adapter, "
                    'or save a full model to stage.path / "model" in the method\'s save_checkpoint.'
                )
            saved = {t.data_ptr() for t in get_peft_model_state_dict(self.model, save_embedding_layers=False).values()}
            lost = [name for name, p in self.trained().items() if p.data_ptr() not in saved]
        elif self.config.deepspeed_plugin is None:  # DeepSpeed would shard the empty model too
            with torch.device("meta"):
                known = dict(type(self.model)(copy.deepcopy(self.model.config)).named_parameters())
            lost = [name for name in self.trained() if name not in known]
        if lost:
            raise ConfigError(
                f"{len(lost)} trained parameters, such as {lost[0]}, are not in the checkpoint of a stage, so the next "
                "stage and the evaluation would not have them. Freeze them; or name modules that are trained next to "
                "an adapter in lora_modules_to_save; or write them in the method's save_checkpoint."
            )

    def saved(self) -> Path:
        """The folder that `save_checkpoint` wrote: the one that the next stage and the evaluation will find.

        Raises:
            RunError: if there is none, or an adapter and a model.
        """
        folders = self.stage.saved
        if len(folders) != 1:
            raise RunError(
                f"save_checkpoint left {len(folders) or 'no'} checkpoints of stage {self.stage.name}. It must write "
                f"either an adapter to {self.stage.path / 'adapter'} or a full model to {self.stage.path / 'model'}."
            )
        return folders[0]

    def save_checkpoint(self) -> Path:
        """Saves the stage's adapter or model, completely or not at all, and returns its folder."""
        target = self.stage.path / ("adapter" if self.model_args.use_peft else "model")
        # All processes take part in gathering the weights. The first one writes, and tells the others the folder.
        with fresh_dir(target) if self.is_world_process_zero() else nullcontext(target) as folder:
            (place,) = broadcast_object_list([str(folder)])
            self.save_model(place)
            if self.is_world_process_zero():
                if not list(folder.glob("*.safetensors")):
                    raise RunError(
                        f"{target} would have no weights, because DeepSpeed or FSDP saved shards. Launch with a config "
                        "from trainers/configs/accelerate, which saves whole weights."
                    )
                # A pickle that nobody reads: a checkpoint holds no pickles.
                (folder / "training_args.bin").unlink(missing_ok=True)
                if self.model_args.use_peft:
                    sort_names(folder, self.accelerator.unwrap_model(self.model).peft_config["default"])
        return target

    @torch.no_grad()
    def as_trained(self) -> list[dict[str, Any]]:
        """The log-likelihoods of a few training rows by the model in memory, which an evaluation has to find again.

        Rows of all lengths are read, the longest included, each with its answer and with the tokens before that.

        Returns:
            For each row its token ids, and the places and nats of its "answer" and of the tokens "before" that.
        """
        assert isinstance(self.train_dataset, Dataset)
        rows, found = self.train_dataset, []
        lengths = [len(ids) for ids in rows["input_ids"]]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        training = self.model.training
        self.model.eval()
        for place in sorted({round(i * (len(rows) - 1) / (_ROWS - 1)) for i in range(_ROWS)}):
            row = rows[order[place]]
            first = next((i for i, label in enumerate(row["labels"]) if label != -100), 0) or 1
            start, stop = max(first - _TOKENS, 1), min(first + _TOKENS, len(row["labels"]))
            ids = row["input_ids"][:stop]
            batch = {"input_ids": ids, "labels": [*[-100] * start, *ids[start:]], "attention_mask": [1] * stop}
            inputs = {k: torch.tensor([v], device=self.accelerator.device) for k, v in batch.items()}
            with self.accelerator.autocast():
                logits, target = self.answer_logits(self.model_wrapped, inputs)
            nats = -cross_entropy(logits, target, reduction="none")
            parts = {"before": (start, first), "answer": (first, stop)}
            found.append(
                {
                    "ids": ids,
                    "parts": {
                        name: {"start": a, "stop": b, "nats": float(nats[a - start : b - start].sum())}
                        for name, (a, b) in parts.items()
                        if a < b
                    },
                }
            )
        self.model.train(training)
        return found

    def save_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Writes what the next stage needs to stage.method_state; for `end_stage`."""
        if self.is_world_process_zero():
            with fresh_dir(self.stage.method_state) as folder:
                save_tensors(tensors, folder / "state.safetensors")

    def load_state(self, on_cpu: Container[str] = ()) -> dict[str, torch.Tensor]:
        """Loads what `save_state` wrote at the stage before; empty at the first stage.

        Args:
            on_cpu: The names of tensors that stay on the CPU; all others are moved to the device.
        """
        if self.stage.index == 1:
            return {}
        file = self.previous.method_state / "state.safetensors"
        if not file.is_file():
            raise RunError(
                f"{file} is missing, and stage {self.stage.name} cannot be trained without it. Restore the file, or "
                "train the stage before again (delete its train.json)."
            )
        device = self.config.device  # `stage_dataset` may call this before there is an accelerator
        return {name: tensor if name in on_cpu else tensor.to(device) for name, tensor in load_file(file).items()}

    # ----------------------------------------------------------------------------------------------- within the stage

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """HF's; a checkpoint within the stage gets only the trained parameters, as they are in memory."""
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
        """HF's checkpoint, then the record that says it is complete; older checkpoints are removed after that.

        HF also writes pickles. It reads them with weights_only, which runs no code, and never reads training_args.bin.
        """
        if self.state.global_step >= self.state.max_steps and self.state.epoch and self.state.epoch % 1:
            return  # resumed within an epoch, HF would take one step more before it compares with max_steps
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
                "method_code": method_code(type(self)),
                "step": self.state.global_step,
                "seconds": time.perf_counter() - self._started,
                "losses": self._resumed_from["losses"] + self._total_loss_scalar,
                "unlogged": unlogged,
                "unlogged_steps": self.state.global_step - self._globalstep_last_logged,
                "counters": self._counts(),
                "files": _sizes(folder),
            }
            write_json(folder / _WHOLE, whole)
            rotate_checkpoints(str(self.stage.attempt), self.config.save_total_limit)

    def _origin(self) -> dict[str, Any]:
        """What must be equal for an attempt to resume from a checkpoint within the stage."""
        before = self.previous.train_file
        return {
            "run": self.run.identity,
            "stage before": fingerprint(before) if before.exists() else None,
            "processes": self.args.world_size,
        }

    def _counts(self) -> dict[str, float]:
        """The counters, as numbers: those of the method and of all classes that it extends.

        Raises:
            ConfigError: if one is not a finite number, since it could not be saved.
        """
        counts: dict[str, Any] = {}
        for name in sorted({name for kind in type(self).__mro__ for name in vars(kind).get("counters", ())}):
            value: Any = getattr(self, name, None)
            counts[name] = value.tolist() if hasattr(value, "tolist") else value
            if not isinstance(counts[name], int | float) or not math.isfinite(counts[name]):
                said = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
                raise ConfigError(
                    f"counters has {name}, which is {said}: use only finite numbers (int or float), and set them in "
                    "begin_stage. Put tensors that change within a stage into kept."
                )
        return counts

    def resume(self) -> str | None:
        """Takes over the counts and tensors of the stage's newest complete checkpoint.

        Returns:
            The folder of the checkpoint; None = begin the stage from the start.

        Raises:
            ConfigError: if a counter is not a number or what is kept is no tensor, since it could not be saved.
        """
        self._counts()
        for name, value in self.kept.items():
            if not isinstance(value, torch.Tensor):
                raise ConfigError(
                    f"kept has {name}, which is a {type(value).__name__}: use only tensors. For a number, use an "
                    "attribute that counters names."
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
                if whole.get("method_code") not in (None, method_code(type(self))):
                    log.warning(
                        "The code of the method has changed since step %d of stage %s, so the stage mixes two methods. "
                        "To train the stage from its beginning, remove %s.",
                        whole["step"],
                        self.stage.name,
                        self.stage.attempt,
                    )
                # Older programs did not write all of them.
                self._resumed_from = {name: whole.get(name, 0) for name in self._resumed_from}
                self._started -= whole["seconds"]
                return str(folder)
            if self.is_world_process_zero():
                remove(folder)  # otherwise the rotation would take it for the newest checkpoint
        return None

    def _whole(self, folder: Path) -> dict[str, Any] | None:
        """The record of a checkpoint within the stage; None = the stage cannot resume from it."""
        try:
            whole = read_json(folder / _WHOLE)
            usable = whole["of"] == self._origin() and whole["files"] == _sizes(folder)
        except (OSError, RunError):
            usable = False  # it was being written when the program was killed
        (answer,) = broadcast_object_list([whole if usable else None])
        return answer


def method_code(trainer: type) -> str | None:
    """A digest of the code in a method's file; None where there is no file, as in a notebook."""
    try:
        file = Path(inspect.getfile(trainer))
    except (OSError, TypeError):
        return None
    if file.parent == Path(__file__).parent:  # `CLTrainer` itself: sequential training is all of this folder's code
        return code_digest(sorted(file.parent.glob("*.py")))
    return code_digest([file])


def method_record(trainer: Any) -> dict[str, Any]:
    """What a method's `record` returns, as JSON. A stage that is trained is not lost because it returns no dict."""
    entries = trainer.record()
    if isinstance(entries, Mapping):
        return _plain(entries)
    said = "%s: record() returned a %s, not a dict, so train.json has none of its entries."
    log.warning(said, trainer.stage.name, type(entries).__name__)
    return {}


def _plain(value: Any) -> Any:
    """Converts a method's record to JSON: tensors and arrays to lists, NaN to null, unknown types to texts.

    It never fails: when the record is written the stage is trained, and must not be lost.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in folder.iterdir() if p.name != _WHOLE}


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes tensors, and numbers as tensors, to a safetensors file."""
    save_file({name: torch.as_tensor(tensor).detach().contiguous() for name, tensor in tensors.items()}, file)


def sort_names(folder: Path, config: Any) -> None:
    """Sorts the names in a folder's adapter_config.json that PEFT's `config` keeps as sets, in random order."""
    file = folder / "adapter_config.json"
    names = {key: sorted(value) for key, value in vars(config).items() if isinstance(value, set)}
    file.write_text(json.dumps({**read_json(file), **names}, indent=2, sort_keys=True), encoding="utf-8")
