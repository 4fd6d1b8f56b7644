"""The shapes of a run's JSON files: the type of each entry, so that a damaged file is an error when it is read.

Where a file lies decides which object it has to hold. Entries that nobody reads are not listed and may be anything.
What an entry means (is this the stage of that folder, does a count add up?) is asked in `records`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import Field
from typing_extensions import TypedDict

from trace_bench.manifest import ALLOWED

Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # their squares are numbers, too
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Scalar = bool | int | float | str | None
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)] | None


def _object(*entries: tuple[Any, str]) -> Any:
    """A JSON object: types, each with the names of the entries that have it. A name with "!" has to be there."""
    types = {}
    for kind, names in entries:
        for name in names.split():
            types[name.rstrip("!")] = Required[kind] if name.endswith("!") else kind
    return TypedDict("Object", types, total=False)  # type: ignore[operator]


def _map(kind: Any) -> Any:
    """An object with any names, whose entries all have one type."""
    return dict[str, kind]


def _list(kind: Any) -> Any:
    return list[kind]


# -------------------------------------------------------------------------------------------------------- what a run is

Text = str | None
Flags = dict[str, bool | None]
Words = dict[str, str]
Anything = dict[str, Any]

_Model = _object((str, "name! path"), (Text, "revision"))
_Data = _object((Text, "path"), (str, "reasoning own_tasks cl_benchmark"), (bool, "demo!"), (Words, "fingerprint test"))
#: The settings of a run that are read again: what is evaluated, and what a comparison shows.
_Config = _object(
    *((Literal[*allowed], name) for name, allowed in ALLOWED.items()),
    (Positive | None, "test_rows max_prompt_length max_new_tokens general_rows judged_rows judged_max_new_tokens"),
    (Positive | None, "train_rows"),
    (Count | None, "num_fewshot max_answer_length"),
    (Count, "per_device_train_batch_size gradient_accumulation_steps seed"),
    (bool, "chat_template trust_remote_code distance"),
    (Anything | None, "chat_template_args engine_args"),
    (list[str], "general judged"),
    (list[Number] | None, "epochs"),
    (Number, "num_train_epochs learning_rate"),
    (int, "max_steps"),
)
#: manifest.json
Manifest = _object(
    (str, "method! trains date answers_only"),
    (Text, "commit"),
    (_Model, "model"),
    (_Data, "data!"),
    (_Config, "config!"),
    (list[str], "tasks! stages"),
    (Words, "checkpoints packages"),
    (dict[str, Annotated[str, Field(pattern=r"^[0-9]{1,9}_[^/\x00]+$")]], "folders"),  # below stages/, not elsewhere
    (bool, "chain renamed_base"),
    (Count, "processes seed"),
    (dict[str, Scalar], "task_versions"),
    (dict[str, Anything], "task_definitions"),
    (dict[str, Text], "begins_with"),
    (Anything, "tuned"),
)

# -------------------------------------------------------------------------------------------------------------- stages

_Loss = _object((Count, "step!"), (Number, "loss! learning_rate"))
#: train.json of a stage
Trained = _object(
    (Count, "stage rows steps tokens peak_memory_bytes processes parameters trainable_parameters"),
    (Seconds, "seconds seconds_around_steps tokens_per_second"),
    (Number, "mean_loss"),
    (_list(_Loss), "losses"),
    (str, "memory_of checkpoint run method_state"),
    (Text, "task date model method_source method_code"),
    (dict[str, Text] | None, "parent"),
)
#: progress.json of a stage in training
Progress = _object(
    (Count, "step! tokens!"),
    (Positive, "steps!"),
    (float, "loss!"),
    (Annotated[float, Field(gt=0, le=1e12)], "seconds!"),
    (Seconds, "time!"),
)
#: whole.json of a checkpoint within a stage
Within = _object(
    (Anything, "of!"),
    (Count, "step!"),
    (Seconds, "seconds!"),
    (Number, "losses!"),
    (dict[str, Number], "counters!"),
    (dict[str, Count], "files!"),
)
#: A line of as_trained.jsonl and of by_transformers.jsonl
LogLikelihoods = _object(
    (_list(Count), "ids!"),
    (_map(_object((Count, "start! stop!"), (Number, "nats!"))), "parts!"),
    (str | None, "base checkpoint dtype transformers"),
)

# --------------------------------------------------------------------------------------------------------------- cells

_Score = _object((Number | None, "value! stderr"))
_Settings = _object(
    (str, "backend"),
    (Count | None, "test_rows general_rows max_prompt_length max_new_tokens given"),
    (Text, "data"),
    (Anything, "engine"),
)
#: A score file: eval/TASK.json
Cell = _object(
    (str, "stage task headline"),
    (Scalar, "version"),
    (Count, "n n_cut n_unfinished n_unscored n_short"),
    (_map(_Score), "metrics"),
    (Flags, "higher_is_better"),
    (dict[str, Number | None], "scale"),
    (Text, "checkpoint samples definition commit"),
    (_Settings, "settings"),
    (_map(_object((Count, "n"))), "subtasks"),
    (_object((Seconds, "seconds!")), "likelihood"),
    (dict[str, Text], "made_with"),
    (Seconds, "seconds from_training from_transformers"),
)
#: The distance from the base model on a set of prompts: distance/SET.json
Distance = _object(
    (str, "stage! set! answers!"),
    (Text, "checkpoint!"),
    (Count, "n!"),
    (Anything, "settings!"),
    (_list(_list(Number)), "kl unseen!"),
    (Seconds, "seconds"),
)
#: A line of the base model's distance/SET.jsonl
Asked = _object(
    (int | str, "doc_id!"),
    (_list(Count), "prompt! answer!"),
    (_list(_list(Count)), "tokens!"),
    (_list(_list(Number)), "logprobs!"),
)
#: A line of eval/samples/TASK.jsonl
Sample = _object((str, "task"), (int | str, "doc_id!"))

# --------------------------------------------------------------------------------------------- judgements, other files

_JudgeSettings = _object((str, "judge!"), (Text, "revision date"), (Anything, "sampling!"), (Scalar, "prompts!"))
#: Verdicts on answers by themselves
_Direct = _object(
    (Count, "n! unscored! broken answered refused safe unsafe"), (Number | None, "rate"), (Interval, "interval")
)
#: Verdicts on pairs
_Pairs = _object(
    (Count, "n! win! tie! lose! unscored! broken identical judged disagreements first second"),
    (Number | None, "net_win_rate"),
)
#: The numbers of a judge: judge/SET.json
JudgedSet = _object(
    (str, "suite lines"),
    (_JudgeSettings, "settings"),
    (Count | None, "limit"),
    (dict[str, Text], "samples"),
    (dict[str, Count], "models"),
    (Count, "unpaired failed forced cut unclosed requests prompt_tokens completion_tokens"),
    (_Direct, "direct"),
    (_Pairs, "pairs"),
)
#: A line of judge/SET.jsonl; identical answers have no verdicts
Verdict = _object(
    (int | str, "doc_id!"),
    (Text, "direct"),
    (str, "combined"),
    (bool, "disagree identical"),
    (Annotated[list[Literal["A", "B", "C"] | None], Field(max_length=2)], "verdicts"),
    (Annotated[list[Count], Field(min_length=2, max_length=2)], "lengths"),
    (list[Text], "broken"),
)
#: calibration-JUDGE.json beside the runs: how often a judge was right on answers of each kind
Calibration = _object(
    (_JudgeSettings, "settings!"),
    (dict[str, Count], "models"),
    (_map(_object((Number | None, "accuracy!"))), "kinds!"),
)
#: judge-cache.batches.json: batches of requests that were submitted and not fetched yet
Batches = _object((_list(_object((Text, "id!"), (str, "endpoint! tag!"), (list[str], "keys!"))), "batches!"))
#: annotation.json of a teacher's folder
Annotation = _object((Anything, "settings!"))
#: result.json of a run, or under any name in a folder of results: see `report.result_file`
_Estimate = _object((Number | None, "value! low high"))
Result = _object(
    (Literal["trace-bench result"], "format!"),
    (Literal[1], "version!"),
    (str, "run! method! trains!"),
    (Count | None, "seed"),
    (Text, "date"),
    (Anything, "protocol! training!"),
    (_object((str, "metric!"), (Number | None, "scale!"), (bool, "higher_is_better!")) | None, "unit!"),
    (_map(_Estimate), "scores! measures!"),
    (
        _map(
            _object(
                (str, "metric!"),
                (Number | None, "scale! value! low high"),
                (bool, "higher_is_better!"),
                (Count | None, "n"),
            )
        ),
        "tasks!",
    ),
    (Words, "packages made_with delta_conditions"),
)
#: Test rows that are trained on, by their numbers
_Leaked = _object((list[Count], "exact! near! other_variant!"), (dict[str, list[Count]], "other_tasks"))
#: What `trace-bench data audit --output` writes
Audit = _object((str, "source!"), (_map(_object((Text, "fingerprint"))), "tasks!"), (_map(_Leaked), "leaked!"))


def of_file(path: Path) -> Any:
    """The object that a file of a run, or beside runs, has to hold; None for any other file."""
    folder, name = path.parent, path.name
    if folder.name in ("eval", "judge", "samples", "distance"):
        lines = path.suffix == ".jsonl"
        distance, judged = (Asked, Verdict) if lines else (Distance, JudgedSet)
        return {"eval": Cell, "judge": judged, "samples": Sample, "distance": distance}[folder.name]
    if name == "train.json" and folder.parent.name == "stages":
        return Trained
    if name.startswith("calibration-"):
        return Calibration
    if name.endswith(".batches.json"):
        return Batches
    return {
        "manifest.json": Manifest,
        "as_trained.jsonl": LogLikelihoods,
        "by_transformers.jsonl": LogLikelihoods,
        "progress.json": Progress,
        "whole.json": Within,
    }.get(name)
