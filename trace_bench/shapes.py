"""What the JSON files of a run hold: the type of each entry, so that no file from elsewhere stops a reader half-way.

Which file has which shape is decided by where it lies. Entries that nobody reads are not listed, and may be anything;
what an entry means (is this the stage of that folder, does a count add up?) is asked by those who use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required

from pydantic import Field
from typing_extensions import TypedDict

Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # their squares are numbers, too
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Scalar = bool | int | float | str | None
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)] | None


class Model(TypedDict, total=False):
    """The base model."""

    name: Required[str]
    path: str
    revision: str | None


class Data(TypedDict, total=False):
    """Where the rows are from."""

    path: str | None
    reasoning: str
    demo: bool
    fingerprint: dict[str, str]
    test: dict[str, str]


class Config(TypedDict, total=False):
    """The settings of a run that are read again: what is evaluated, and what a comparison shows."""

    backend: Literal["vllm", "hf"]
    cells: Literal["seen", "all", "own"]
    test_rows: Positive | None
    max_prompt_length: Positive | None
    max_new_tokens: Positive | None
    chat_template: bool
    chat_template_args: dict[str, Any] | None
    num_fewshot: Count | None
    engine_args: dict[str, Any] | None
    trust_remote_code: bool
    general: list[str]
    general_stages: Literal["last", "all"]
    general_rows: Positive | None
    judged: list[str]
    judged_rows: Positive | None
    judged_max_new_tokens: Positive | None
    train_rows: Positive | None
    epochs: list[Number] | None
    num_train_epochs: Number
    max_steps: int
    learning_rate: Number
    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    max_answer_length: Count | None
    seed: Count


class Manifest(TypedDict, total=False):
    """manifest.json."""

    method: Required[str]
    trains: str
    model: Model
    tasks: Required[list[str]]
    stages: list[str]
    checkpoints: dict[str, str]
    chain: bool
    renamed_base: bool
    processes: Count
    task_versions: dict[str, Scalar]
    task_definitions: dict[str, dict[str, Any]]
    data: Required[Data]
    config: Required[Config]
    seed: Count
    date: str
    packages: dict[str, str]
    commit: str | None


class Loss(TypedDict, total=False):
    """The loss of a step."""

    step: Required[Count]
    loss: Required[Number]
    learning_rate: Number


class Trained(TypedDict, total=False):
    """train.json of a stage."""

    stage: Count
    task: str | None
    rows: Count
    steps: Count
    tokens: Count
    seconds: Seconds
    seconds_around_steps: Seconds
    tokens_per_second: Seconds
    peak_memory_bytes: Count
    memory_of: str
    processes: Count
    parameters: Count
    trainable_parameters: Count
    mean_loss: Number
    losses: list[Loss]
    checkpoint: str
    run: str
    date: str | None
    model: str | None
    parent: dict[str, str | None] | None
    method_source: str | None
    method_state: str


class Progress(TypedDict):
    """progress.json of a stage in training."""

    step: Count
    steps: Positive
    loss: float
    tokens: Count
    seconds: Annotated[float, Field(gt=0, le=1e12)]
    time: Seconds


class Within(TypedDict):
    """whole.json of a checkpoint within a stage."""

    of: dict[str, Any]
    step: Count
    seconds: Seconds
    losses: Number
    counters: dict[str, Number]
    files: dict[str, Count]


class Score(TypedDict, total=False):
    """A metric of a cell."""

    value: Required[Number | None]
    stderr: Number | None


class Settings(TypedDict, total=False):
    """How a cell was made."""

    backend: str
    test_rows: Count | None
    general_rows: Count | None
    max_prompt_length: Count | None
    max_new_tokens: Count | None
    data: str | None
    engine: dict[str, Any]


class SubTask(TypedDict, total=False):
    """A part of a suite."""

    n: Count


class Cell(TypedDict, total=False):
    """A score file: eval/TASK.json."""

    stage: str
    task: str
    version: Scalar
    n: Count
    n_cut: Count
    n_unfinished: Count
    n_unscored: Count
    headline: str
    metrics: dict[str, Score]
    higher_is_better: dict[str, bool | None]
    scale: dict[str, Number | None]
    checkpoint: str | None
    settings: Settings
    subtasks: dict[str, SubTask]
    samples: str | None
    made_with: dict[str, str | None]
    definition: str | None
    commit: str | None
    seconds: Seconds


class Sample(TypedDict, total=False):
    """A line of eval/samples/TASK.jsonl."""

    task: str
    doc_id: Required[int | str]


class JudgeSettings(TypedDict, total=False):
    """Who judged, and how."""

    judge: Required[str]
    revision: str | None
    sampling: Required[dict[str, Any]]
    date: str | None
    prompts: Required[Scalar]


class Direct(TypedDict, total=False):
    """Verdicts on answers by themselves."""

    n: Required[Count]
    unscored: Required[Count]
    broken: Count
    answered: Count
    refused: Count
    safe: Count
    unsafe: Count
    rate: Number | None
    interval: Interval


class Pairs(TypedDict, total=False):
    """Verdicts on pairs."""

    n: Required[Count]
    win: Required[Count]
    tie: Required[Count]
    lose: Required[Count]
    unscored: Required[Count]
    broken: Count
    identical: Count
    judged: Count
    disagreements: Count
    first: Count
    second: Count
    net_win_rate: Number | None


class JudgedSet(TypedDict, total=False):
    """The numbers of a judge: judge/SET.json."""

    suite: str
    settings: JudgeSettings
    lines: str
    limit: Count | None
    samples: dict[str, str | None]
    unpaired: Count
    direct: Direct
    pairs: Pairs
    failed: Count
    forced: Count
    cut: Count
    unclosed: Count
    requests: Count
    prompt_tokens: Count
    completion_tokens: Count


class Verdict(TypedDict, total=False):
    """A line of judge/SET.jsonl."""

    doc_id: Required[int | str]
    direct: str | None
    combined: str
    disagree: bool
    identical: bool
    verdicts: Annotated[list[Literal["A", "B", "C"] | None], Field(max_length=2)]  # none of answers that are identical
    lengths: Annotated[list[Count], Field(min_length=2, max_length=2)]
    broken: list[str | None]


class PlantedKind(TypedDict, total=False):
    """How often a judge was right on answers of one kind."""

    accuracy: Required[Number | None]


class Calibration(TypedDict, total=False):
    """calibration-JUDGE.json beside the runs."""

    settings: Required[JudgeSettings]
    kinds: Required[dict[str, PlantedKind]]


class Batch(TypedDict, total=False):
    """A batch of requests that was submitted."""

    id: Required[str | None]
    endpoint: Required[str]
    keys: Required[list[str]]
    tag: Required[str]


class Batches(TypedDict):
    """judge-cache.batches.json: what was not fetched yet."""

    batches: list[Batch]


class Annotation(TypedDict, total=False):
    """annotation.json of a teacher's folder."""

    settings: Required[dict[str, Any]]


class Leaked(TypedDict):
    """Test rows that are trained on, by their numbers."""

    exact: list[Count]
    near: list[Count]
    other_variant: list[Count]
    other_tasks: NotRequired[dict[str, list[Count]]]


class AuditedTask(TypedDict, total=False):
    """A task of an audit."""

    fingerprint: str | None


class Audit(TypedDict, total=False):
    """What `trace-bench data audit --output` writes."""

    source: Required[str]
    tasks: Required[dict[str, AuditedTask]]
    leaked: Required[dict[str, Leaked]]


def of_file(path: Path) -> Any:
    """The shape of a file of a run, or beside runs, from where it lies; None for any other file."""
    folder, name = path.parent, path.name
    if folder.name in ("eval", "judge", "samples"):
        lines = path.suffix == ".jsonl"
        return {"eval": Cell, "judge": Verdict if lines else JudgedSet, "samples": Sample}[folder.name]
    if name == "train.json" and folder.parent.name == "stages":
        return Trained
    if name.startswith("calibration-"):
        return Calibration
    if name.endswith(".batches.json"):
        return Batches
    return {"manifest.json": Manifest, "progress.json": Progress, "whole.json": Within}.get(name)
