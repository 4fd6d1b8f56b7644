"""The loop over the stages of a run.

Each stage is loaded from the checkpoint of the stage before, whether or not this process trained it, so a resumed run
and an uninterrupted one are the same run.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers.trainer_pt_utils import get_model_param_count
from trl import ModelConfig, TrlParser

from trace_bench import checks, ending, packaged, records
from trace_bench.cli.options import option_words
from trace_bench.engine import models
from trace_bench.keys import refuse_secrets
from trace_bench.run import OF_TRAINING, Run, RunError, Stage, read_json
from trace_bench.tasks import check_stages, data_record, load_tasks, training_rows, use_own_tasks
from trace_bench.text import prepare_logging, printable
from trace_bench.versions import source_commit
from trace_bench.waiting import locked, others_wait
from trace_tasks import data
from trace_tasks.data.files import check_writable, fingerprint, remove, write_json
from trace_tasks.errors import with_neighbours
from trace_tasks.tokens import Chat, check_room
from trainers.base import preflight
from trainers.base.checkpoints import method_code, method_record
from trainers.base.config import CLConfig, ConfigError
from trainers.base.options import check_model_args, check_optimizer
from trainers.base.trainer import CLTrainer
from trainers.base.tuned import tuned_settings, tuned_words
from trainers.base.writing import run_alone

log = logging.getLogger(__name__)

_MEMORY = (
    "Begin a new run (--output_dir) with a lower per_device_train_batch_size and a higher "
    "gradient_accumulation_steps, or gradient_checkpointing: true, or a lower max_prompt_length or max_answer_length, "
    "or LoRA (use_peft: true)."
)


def main(trainer: type[CLTrainer], config: type[CLConfig], argv: list[str] | None = None) -> None:
    """Parses `--config FILE.yaml` and command-line options (which win) and trains every stage of the run."""
    given = None if argv is None else f"python -m trainers.{method_name(trainer)} {shlex.join(argv)}"
    with ending.command("train", given, _MEMORY):
        prepare_logging()
        if "--help_all" in (sys.argv if argv is None else argv):
            argv = ["--help"]
        train(trainer, *parse(config, argv, method_name(trainer)))


def parse(config: type[CLConfig], argv: list[str] | None, method: str) -> list[Any]:
    """The config of the method and TRL's ModelConfig, from the command line and the files that it names."""
    argv = sys.argv[1:] if argv is None else argv
    named = ("--config=", "--like=", "--tuned=")  # read below, as two words
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith(named) else [word])]
    if argv.count("--config") > 1:
        raise ConfigError("--config is given more than once. Give one file; other options override its settings.")
    for i, word in enumerate(argv[:-1], 1):
        if word == "--config":
            argv[i] = str(packaged.find("config", argv[i], packaged.configs()))
    if tuned := tuned_words(argv, method):
        _print_once(f"{method} uses settings from the table (--tuned): {shlex.join(tuned)}")
    known = [field.name for kind in (config, ModelConfig) for field in fields(kind)]
    if "--like" in argv[:-1]:
        i = argv.index("--like")
        like = _words_like(Run.open(argv[i + 1]), known, config, method)
        argv[i : i + 2] = [*like, *tuned]
    else:
        argv = [*tuned, *argv]
    # No abbreviations: --tune would record the table without using it, since `tuned_words` looks for --tuned.
    parser = TrlParser((config, ModelConfig), allow_abbrev=False)  # type: ignore[arg-type]
    parser.error = _refuse  # type: ignore[method-assign]  # without two hundred lines of usage
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except (IndexError, OSError, TypeError, ValueError, yaml.YAMLError) as e:  # no file (name), no YAML
        other = isinstance(e, UnicodeDecodeError) and e.encoding != "utf-8"
        hint = ". This locale is not UTF-8: set PYTHONUTF8=1." * other
        raise ConfigError(f"The configuration cannot be read: {e}{hint}") from e
    if names := [word.lstrip("-").partition("=")[0] for word in unknown if word.startswith("--")]:
        near = with_neighbours(names, known)
        raise ConfigError(f"{method} has no option {near}. --help lists the usual options, --help_all all of them.")
    if unknown:
        raise ConfigError(f"{' '.join(unknown)} does not belong to an option. Write options as --OPTION VALUE.")
    return parsed


def _words_like(run: Run, known: Collection[str], config: type[CLConfig], method: str) -> list[str]:
    """The options of a run as words of a command line, for another method: only the options that it has.

    Its replay_ratio is taken over only by a method that is made for replaying.
    """
    record, other = run.manifest["data"], run.manifest["method"]
    settings = {**run.manifest["config"], "data": "demo" if record["demo"] else record["path"]}
    use_own_tasks(run)
    model = run.manifest["model"]
    if model["name"] != models.QUICKSTART and not os.path.isdir(model["name"]) and os.path.isdir(model.get("path", "")):
        settings["model_name_or_path"] = model["path"]  # the folder was moved, or its name is a relative path
    if other != method and config.replay_ratio is None:
        settings.pop("replay_choice", None)
        if ratio := settings.pop("replay_ratio", None):
            _print_once(f"{method} leaves out replay_ratio {ratio} of {run.path}")
    tuned = [(key, value) for key, value in run.manifest.get("tuned", {}).items() if settings.get(key) == value]
    if other != method and (words := [word for pair in tuned if pair[0] in known for word in option_words(*pair)]):
        table = f"which {other} had from the table of settings"
        _print_once(f"{method} uses {shlex.join(words)}, {table}; options after --like override them")
    given = {name: value for name, value in settings.items() if name in known and value != []}
    return [word for name, value in given.items() for word in option_words(name, value)]


def _print_once(text: str) -> None:
    """Prints a line, from the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}. --help lists the usual options, --help_all all of them.")


def method_name(trainer: type[CLTrainer]) -> str:
    """The name of a method is the name of its file."""
    if trainer.__module__ == CLTrainer.__module__:
        return "sequential"
    if trainer.__module__ == "__main__":
        return Path(sys.argv[0]).stem
    return trainer.__module__.rpartition(".")[2]


def train(trainer: type[CLTrainer], config: CLConfig, model_args: ModelConfig) -> Run:
    """Trains every stage of a run that is not trained yet.

    Args:
        trainer: The method.
        config: The settings of the run.
        model_args: TRL's arguments of the base model and of LoRA.

    Returns:
        The run.

    Raises:
        TraceError: before anything expensive starts, if something cannot work.
    """
    state, method = PartialState(), method_name(trainer)
    if not model_args.model_name_or_path:
        raise ConfigError(
            "model_name_or_path is not set. Use a config that sets it (--config quickstart; `trace-bench configs` "
            f"lists them), or give a hub id, a local folder, or {models.QUICKSTART}."
        )
    if not config.output_dir:
        raise ConfigError("output_dir is not set. Give the folder of the run: --output_dir runs/NAME.")
    check_model_args(model_args)
    check_optimizer(config)
    preflight.check_devices(config, state.num_processes, method)
    with state.main_process_first():
        trace_data = data.open_data(config.tasks, config.data)
        base = models.resolve_model(model_args.model_name_or_path)
    tasks = _load_tasks(config, trace_data)
    preflight.check_method(trainer, config, method)
    preflight.check_trackers(config)
    revision = model_args.model_revision
    if not os.path.isdir(base):  # a folder's fingerprint reads all its bytes: that waits until the options are checked
        revision = models.pinned_revision(base, revision)
    # Pinned, so that a method reads the same model's configuration as the training.
    added = trainer.prepare(config, _pinned(model_args, base, revision)) or {}
    revision = models.pinned_revision(base, revision)
    pinned = _pinned(model_args, base, revision)
    model = {"name": model_args.model_name_or_path, "path": base, "revision": revision}
    manifest = _manifest(method, config, model_args, model, trace_data, tasks, state.num_processes) | added
    refuse_secrets(manifest, "the manifest's")
    preflight.check_launch()
    tokenizer = models.load_tokenizer(base, pinned.model_revision, config.trust_remote_code)
    checked = preflight.check_model(config, pinned, tokenizer, tasks, manifest["trains"])
    rows = _make_rows(config, checked, tasks, tokenizer)
    # The first process of a launch holds the lock for all.
    with locked(Path(config.output_dir), "train") if state.is_main_process else nullcontext():
        with state.main_process_first():
            manifest = checks.with_recorded_base_name(config.output_dir, manifest)
            run = replace(Run.create(config.output_dir, manifest, restart=True), rows=rows)
        if state.is_main_process and not all(stage.is_trained for stage in run.stages):
            check_writable(run.path)
        Loop(trainer, config, pinned, run, trace_data.root, tokenizer, state).train()
    return run


def _load_tasks(config: CLConfig, trace_data: data.Data) -> dict[str, Any]:
    """Loads the tasks of the stages by name. Checks all data of the run now, even what is needed hours later."""
    if config.data and os.environ.get("TRACE_DATA", config.data) not in (config.data, str(trace_data.root)):
        log.warning("TRACE_DATA is ignored: the configuration has data=%s.", config.data)
    trace_data.use()
    trace_data.check()
    for name in (*config.general, *config.judged):
        data.source_fingerprint(name)
    tasks = load_tasks(config.tasks)
    check_stages(tasks)
    return tasks


def _manifest(
    method: str,
    config: CLConfig,
    model_args: ModelConfig,
    model: dict[str, Any],
    trace_data: data.Data,
    tasks: dict[str, Any],
    processes: int,
) -> dict[str, Any]:
    """The manifest of a run: its method, model, data and settings."""
    plain, always = ModelConfig(), ("dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout")
    of_model = {k: v for k, v in asdict(model_args).items() if v != getattr(plain, k) or k in always}
    tuned = tuned_settings(config.tuned, method)
    return {
        "method": method,
        "trains": "lora" if model_args.use_peft else "full",
        "model": model,
        "tasks": config.tasks,
        **({"stages": config.stages} if config.stages != config.tasks else {}),
        # A different number of processes is a different batch.
        **({"processes": processes} if processes > 1 else {}),
        "task_versions": {name: task.VERSION for name, task in tasks.items()},
        "task_definitions": checks.definitions(tasks, config.output_dir),
        "data": data_record(trace_data, tasks),
        "seed": config.seed,
        # The date that a chat template gets, on whatever day a stage is trained or evaluated.
        "date": time.strftime("%Y-%m-%d"),
        **({"tuned": tuned} if tuned else {}),
        "config": config.manifest() | of_model,
    }


def _pinned(model_args: ModelConfig, base: str, revision: str) -> ModelConfig:
    """The arguments of the model with its revision fixed, so that all stages load the same one."""
    model_args = copy.copy(model_args)
    model_args.model_name_or_path = base
    if isinstance(model_args.lora_target_modules, str) and re.fullmatch(r"\w+", model_args.lora_target_modules):
        # TRL turns a list with one name into a text, which PEFT reads as a pattern for a module's whole path.
        model_args.lora_target_modules = [model_args.lora_target_modules]
    if not Path(base).is_dir():
        model_args.model_revision = revision
    return model_args


def _make_rows(config: CLConfig, model: Any, tasks: dict[str, Any], tokenizer: Any) -> dict[str, list[tuple[str, str]]]:
    """The training rows of all tasks, made before the first stage: a bad row of the last task would cost days."""
    chat = None
    # Sets to be judged and neutral questions are asked in a template, too, if there is one.
    others = tokenizer.chat_template and (config.judged or config.distance)
    if config.chat_template or config.chat_template_args or others:
        assert not isinstance(config.chat_template_args, str)
        made = Chat(tokenizer, config.chat_template_args)
        if config.chat_template:
            check_room(chat := made, config.max_prompt_length)
    rows = {name: training_rows(task, config.train_rows, chat) for name, task in tasks.items() if config.stages}
    preflight.check_rows(config, model, tokenizer, rows, chat)
    return rows if chat is None else {}  # a stage makes chat prompts itself, with the date on which the run began


@dataclass
class Loop:
    """Trains the stages of a run one after the other."""

    trainer: type[CLTrainer]
    config: CLConfig
    model_args: ModelConfig
    run: Run
    root: Path | None
    tokenizer: Any
    state: PartialState

    def train(self) -> None:
        """Trains the stages that are not trained yet, and evaluates and drops checkpoints as `keep` says."""
        if self.config.keep == "evaluated":
            self._evaluate(self.run.stages[0])
        for stage in self.run.stages[1:]:
            if stage.is_trained:
                records.check_stages(self.run, [stage])
                self._say(stage, f"{stage.name}: already trained")
                if self.state.is_main_process:
                    remove(stage.attempt)  # killed just after train.json was written
            else:
                with others_wait():  # a large base model is read
                    self._check_sources(stage)
                self._train_stage(stage)
            if self.config.keep == "evaluated":
                self._evaluate(stage)
            if self.config.keep != "all" and stage.index > 1:
                self._remove_output(self.run.stages[stage.index - 1])

    def _train_stage(self, stage: Stage) -> None:
        self._remove_output(stage)  # by a killed attempt
        self.state.wait_for_everyone()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self.config.deepspeed_plugin is not None:
            # accelerate sets its plugin up once per process, but HF's loader uses the plugin made last, which was made
            # for the manifest: reset both for this stage.
            AcceleratorState._reset_state()
            self.config.deepspeed_plugin.set_deepspeed_weakref()
        trainer = self.trainer(self.config, self.model_args, self.run, stage, self.tokenizer)
        trainer.write_as_trained(trainer.previous)
        trainer._started = time.perf_counter()
        trainer.begin_stage()
        hook_seconds = time.perf_counter() - trainer._started
        checkpoint = trainer.resume()
        if checkpoint is not None:
            self._say(stage, f"{stage.name}: continues at step {trainer._resumed_from['step']}")
        elif self.state.is_main_process:  # the TensorBoard log of a lost attempt
            remove(self.run.path / "tensorboard" / stage.name)
        trainer.train(resume_from_checkpoint=checkpoint)
        if self.state.is_main_process:
            trainer.warn_of_idle()
        trained = time.perf_counter()
        trainable = get_model_param_count(trainer.model, trainable_only=True)
        trainer.end_stage()
        seconds = time.perf_counter() - trainer._started
        hook_seconds += time.perf_counter() - trained
        trainer.write_as_trained(stage)
        with others_wait():  # large models are merged, written and read here
            trainer.save_checkpoint()
        with others_wait():
            if self.state.is_main_process:
                self._record(trainer, trainable, seconds, hook_seconds)
        # The next stage loads its model from the disk: free this one first.
        del trainer
        clear_device_cache(garbage_collection=True)

    def _record(self, trainer: CLTrainer, trainable: int, seconds: float, hook_seconds: float) -> None:
        """Writes train.json, which marks the stage as trained; begin_stage and end_stage took `hook_seconds`."""
        stage = trainer.stage
        record = _summary(trainer, seconds) | {
            "trainable_parameters": trainable,
            "seconds_around_steps": round(hook_seconds, 3),
            "commit": source_commit(),
            "method_code": method_code(self.trainer),
            **records.origin(self.run, stage),
            "checkpoint": fingerprint(trainer.saved()),
        }
        if stage.method_state.is_dir():
            record["method_state"] = fingerprint(stage.method_state)
        of_method = method_record(trainer)
        if taken := sorted(of_method.keys() & record.keys()):
            said = "%s: left out %s of record(), because train.json already has it."
            log.warning(said, stage.name, ", ".join(taken))
        record = {**of_method, **record}
        write_json(stage.train_file, record)
        remove(stage.attempt)
        losses = [entry["loss"] for entry in record["losses"]]
        loss = f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else f"{record['mean_loss']:.3f}"
        self._say(
            stage,
            f"{stage.task or stage.name}: {record['rows']} rows, {record['steps']} steps, loss {loss}, "
            f"{record['tokens_per_second']:.0f} tokens/s, {seconds:.0f} s",
        )

    def _check_sources(self, stage: Stage) -> None:
        """Refuses to train if the model, the data or the stage before changed since the run began."""
        if not self.state.is_main_process:
            return
        before = self.run.stages[stage.index - 1]
        checks.verify(self.run, [before] if before.saved else [], self.root)
        last = read_json(before.train_file) if before.train_file.exists() else {}
        if last.get("method_code") not in (None, method_code(self.trainer)):
            log.warning(
                "The code of the method %s has changed since stage %s was trained, so this run mixes two methods. For "
                "a clean run, begin again in a new folder.",
                method_name(self.trainer),
                before.name,
            )
        recorded = last.get("method_state")
        if recorded and before.method_state.is_dir() and fingerprint(before.method_state) != recorded:
            raise RunError(
                f"{before.method_state} has changed since the training of the stage. Restore it, or delete "
                f"{before.train_file} to train the stage again."
            )

    def _evaluate(self, stage: Stage) -> None:
        """Evaluates one stage in a separate process, which frees all its memory when it ends."""
        # --follow also waits if another process is evaluating the stage.
        words = ["trace_bench", "evaluate", str(self.run.path), "--stages", str(stage.index), "--follow"]
        with others_wait():
            if self.state.is_main_process and run_alone(words):
                raise RunError(
                    f"The evaluation of {stage.name} failed: see the error above. Finished work is kept; run this "
                    "again."
                )

    def _remove_output(self, stage: Stage) -> None:
        if self.state.is_main_process:
            for kind in OF_TRAINING:
                remove(stage.path / kind)

    def _say(self, stage: Stage, text: str) -> None:
        if self.state.is_main_process:
            print(printable(f"stage {stage.index}/{len(self.run.stages) - 1} {text}"), flush=True)


def _summary(trainer: CLTrainer, seconds: float) -> dict[str, Any]:
    """The part of train.json about the training itself."""
    assert isinstance(trainer.train_dataset, Dataset)
    cuda = trainer.args.device.type == "cuda"  # with use_cpu a GPU may exist without being used
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps, tokens = trainer.state.global_step, int(trainer._total_train_tokens)
    return {
        "stage": trainer.stage.index,
        "task": trainer.stage.task,
        "rows": len(trainer.train_dataset),
        "epochs": round(trainer.state.epoch or 0, 4),  # not the setting: max_steps overrides it
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_bytes": peak,
        "memory_of": "cuda" if cuda else "process",
        "processes": trainer.accelerator.num_processes,
        # Counts the whole model, also where this process holds only a part.
        "parameters": get_model_param_count(trainer.model),
        # HF's own "train_loss" covers only the steps since the last resume.
        "mean_loss": (trainer._resumed_from["losses"] + trainer._total_loss_scalar) / max(steps, 1),
        "losses": [
            {key: entry[key] for key in ("step", "loss", "learning_rate")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        **({"replayed": trainer._replayed_rows} if trainer._replayed_rows else {}),
    }
