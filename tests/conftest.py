"""Shared by the tests: no hub, a cache of their own, a tiny model, and a function that trains it in a second.

The other files without tests are helpers. `made_runs.py` writes runs by hand, for reports. `method_runs.py` trains
methods and compares two runs. `architectures.py` makes small models of many kinds and their reference answers.
`judge_server.py` is a fake judge. `forks.py` runs programs with the slow imports done. `distributed.py` is the work of
two processes. `kill_harness.py` kills commands at random moments. `gpu_part.py` is a part of the GPU check.
"""

import gc
import importlib
import importlib.metadata
import io
import json
import os
import pickle
import shutil
import signal
import string
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from functools import cache, partial, wraps
from itertools import chain, count, product
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("TRACE_DATA", None)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job; its children would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it at import; more threads would only wait for each other

import pytest

SHARED = Path(__file__).parents[2] / "shared"
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items):
    """Runs the longest tests first, so that no process is still working when the others have ended."""
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout")), default=0))


def pytest_terminal_summary(terminalreporter):
    """Shows the sums of all `record_property("counts", {what: number})`, from all test processes."""
    counts: Counter[str] = Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", None) == "teardown":
            for name, value in report.user_properties:
                counts.update(value if name == "counts" else {})
    if counts:
        terminalreporter.section("counts")
        terminalreporter.write_line(", ".join(f"{what} {n}" for what, n in counts.items()))


@pytest.fixture
def fast_bf16(monkeypatch):
    """A machine on which bfloat16 is the default, whatever CPU it has."""
    import torch

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(os, "fsync", lambda fd: None)  # no test cuts the power, and each stage would wait for 14 calls
        yield


@pytest.fixture(scope="module", autouse=True)
def _undrawn(request: pytest.FixtureRequest):
    """Does not render figures, which would take a second per report. Only two test files look at them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ("test_html", "test_units"):
            leave_undrawn(patch)
        yield


def leave_undrawn(patch: pytest.MonkeyPatch) -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" width="9pt" height="9pt"><g id="d"/></svg>'
    patch.setattr("trace_bench.report.drawing._svg", lambda figure: svg)
    patch.setattr("trace_bench.report.drawing._png", lambda figure: b"")


@pytest.fixture(scope="module", autouse=True)
def _few_likelihoods(request: pytest.FixtureRequest):
    """Lets a stage keep the likelihoods of three rows, not of eight. Only one test file looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        if "trainers.base.checkpoints" in sys.modules and request.module.__name__ != "test_trained":
            patch.setattr("trainers.base.checkpoints._ROWS", 3)
        yield


@pytest.fixture(scope="module", autouse=True)
def _read_once():
    """Makes lm-eval parse the YAML files of our tasks once, not for each index. Tests only edit files of their own."""
    if "lm_eval.tasks._index" in sys.modules:  # tests that do not need lm-eval do not import it for this
        read_once()


def read_once() -> None:
    index = importlib.import_module("lm_eval.tasks._index")
    if not hasattr(index.load_yaml, "cache"):
        read = index.load_yaml
        parsed = cache(lambda path, options: pickle.dumps(read(path, **dict(options))))
        ours = Path(__file__).parents[1] / "trace_tasks"

        def load_yaml(path, **options):
            known = ours in Path(path).parents
            return pickle.loads(parsed(path, tuple(options.items()))) if known else read(path, **options)

        load_yaml.cache = parsed
        index.load_yaml = load_yaml


@pytest.fixture
def demo_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACE_DATA", "demo")


@pytest.fixture
def make(tmp_path: Path):
    """Writes a run by hand, see `made_runs.make_run`."""
    from made_runs import make_run

    return partial(make_run, tmp_path / "runs")


@pytest.fixture
def as_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the three tasks of made runs an order of the paper, so that reports show the paper's numbers."""
    from made_runs import TASKS

    from trace_tasks.data import ORDERS

    monkeypatch.setattr("trace_bench.report.paper.ORDERS", ORDERS | {"order": TASKS})


@pytest.fixture
def bounds(make):
    """Writes the runs that serve as bounds, see `made_runs.make_bounds`."""
    from made_runs import make_bounds

    return partial(make_bounds, make)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model with a byte-level tokenizer, and with one like LLaMA-2's."""
    folder = tmp_path_factory.mktemp("models")
    made = {"bytes": make_tiny_model(folder / "tiny"), "pieces": make_tiny_model(folder / "pieces", pieces_tokenizer())}
    UNCHANGED.update(map(str, made.values()))
    return made


@pytest.fixture
def tiny_model(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    return tiny_models[getattr(request, "param", "bytes")]


#: For tests that compare engines: the tiny model with each of the two tokenizers.
both_tokenizers = pytest.mark.parametrize("tiny_model", ["bytes", "pieces"], indirect=True)


def byte_tokenizer():
    """A tokenizer whose tokens are bytes. It adds no BOS."""
    from bench.gpu import shapes

    tokenizer = shapes.byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pieces_tokenizer(legacy: bool = False, **kwargs):
    """A tokenizer like LLaMA-2's: pieces with a word mark, bytes for characters without a piece, and a BOS.

    The word mark stands for a space. Decoding drops this space at the start of a text.

    Args:
        legacy: Whether special tokens are followed by a mark, too (the scheme "always", not "first"), as in LLaMA-2.
        **kwargs: Arguments of LlamaTokenizer, such as add_eos_token.
    """
    from transformers import LlamaTokenizer

    letters = sorted(set(string.ascii_letters + string.digits + string.punctuation))
    merges = [("▁", letter) for letter in letters]  # "▁A" is one piece
    merges += product(string.ascii_lowercase, repeat=2)  # most pieces are text, so different ids give different texts
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *map("".join, merges)]
    tokenizer = LlamaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        **{"add_bos_token": True, "pad_token": "</s>", "legacy": legacy, **kwargs},
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(path: Path, tokenizer=None) -> Path:
    """Writes a Llama of 0.3M parameters with tied embeddings, and a byte-level tokenizer, to a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,  # heads of 64, a size that every attention kernel supports
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def checkpoints(tiny_model: Path, tmp_path: Path) -> dict[str, Path]:
    """An adapter and a full model. Their random weights give varied texts, so equal texts mean equal weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = {"adapter": tmp_path / "an_adapter", "full model": tmp_path / "a_model"}
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(paths["full model"])
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(paths["full model"])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(paths["adapter"])
    return paths


@pytest.fixture
def written_here(monkeypatch: pytest.MonkeyPatch) -> list:
    """Makes models write answers in this process, which saves a second process its imports. Returns their requests."""
    import torch
    from accelerate.state import AcceleratorState

    from trace_bench.run import read_json
    from trainers.base import answering, writing

    asked = []

    def answer(words: list[str]) -> int:
        asked.append(read_json(Path(words[1])))
        with torch.random.fork_rng():
            answering.answer(Path(words[1]))
        AcceleratorState._reset_state()  # lm-eval has set it up, but a trainer follows
        return 0

    monkeypatch.setattr(writing, "run_alone", answer)
    return asked


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict:
    return quick_options(tiny_model, tmp_path / "run")


@pytest.fixture(scope="session")
def trained(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `quick_options`, trained once for all tests of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_DATA", "demo")
        return train(quick_options(tiny_models["bytes"], tmp_path_factory.mktemp("trained") / "run")).path


@pytest.fixture
def run(trained: Path, options: dict):
    """A copy of the trained run. `train(options)` continues it."""
    from trace_bench.run import Run

    return Run.open(shutil.copytree(trained, options["output_dir"]))


def quick_options(model: Path, output_dir: Path) -> dict:
    """Options of a run that trains the tiny model on two demo tasks in about a second."""
    return {
        "model_name_or_path": str(model),
        "output_dir": str(output_dir),
        "data": "demo",
        "tasks": ["trace_fomc", "trace_numglue_ds"],
        "train_rows": 16,
        "test_rows": 6,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_prompt_length": 96,
        "max_new_tokens": 4,
        "gradient_checkpointing": False,
        "use_peft": True,
        "lora_r": 4,
        "backend": "hf",
        "disable_tqdm": True,
    }


def train(options: dict, trainer=None, config=None):
    """Trains a run with the given options, as `python -m trainers.<method>` does, and returns it."""
    from dataclasses import fields

    from trl import ModelConfig

    from trainers import base

    freeze_imports()
    spare_extras()
    read_once()
    names = {f.name for f in fields(ModelConfig)}
    return base.train(
        trainer or base.CLTrainer,
        (config or base.CLConfig)(**{k: v for k, v in options.items() if k not in names}),
        ModelConfig(**{k: v for k, v in options.items() if k in names}),
    )


_TRAININGS = count()


def freeze_imports() -> None:
    """Hides permanent objects from the garbage collector, which would take half of each stage's time.

    It is repeated now and then, because later trainings and tests add permanent objects.
    """
    if next(_TRAININGS) % 20 in (0, 1):
        gc.collect()
        gc.freeze()


@cache
def spare_extras() -> None:
    """Skips work of libraries at each stage or step that no test needs.

    This is PEFT's model card, fingerprints of data sets, accelerate's search for packages and compiled layers at each
    step, and the text of a config that transformers makes for its log. Models that no test changes are checked once.
    """
    from accelerate.utils import other
    from datasets import arrow_dataset
    from peft import PeftModel
    from transformers import PreTrainedConfig

    from trace_bench import versions
    from trace_bench.engine import models
    from trainers.base import preflight

    other.has_compiled_regions = lambda module: False
    preflight.check_base = _once_for_unchanged(preflight.check_base)
    models.pinned_revision = _once_for_unchanged(models.pinned_revision)
    PreTrainedConfig.__repr__ = object.__repr__
    versions.version = cache(versions.version)
    numbers = count()
    importlib.metadata.metadata = cache(importlib.metadata.metadata)
    PeftModel.create_or_update_model_card = lambda self, folder: None
    arrow_dataset.generate_fingerprint = lambda dataset: f"{next(numbers):016x}"


#: Folders of base models that no test changes.
UNCHANGED: set[str] = set()


def _once_for_unchanged(check):
    known = cache(check)
    return wraps(check)(lambda base, *args: (known if base in UNCHANGED else check)(base, *args))


def write_task(folder: Path, name: str, rows: list[dict], yaml: str = "", test: list[dict] | None = None) -> Path:
    """Writes a user's own task from rows with `q` and `a`. Lines of `yaml` replace ours with the same key."""
    folder.mkdir(exist_ok=True)
    for split, content in {"train": rows, "test": test or rows}.items():
        (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content), encoding="utf-8")
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{name}_{s}.jsonl") for s in ("train", "test")}},
        "training_split": "train",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "q",
        "doc_to_target": "a",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"max_gen_toks": 4, "until": []},
    }
    lines = [f"{k}: {json.dumps(v)}\n" for k, v in settings.items() if f"{k}:" not in yaml]
    (folder / f"{name}.yaml").write_text("".join(lines) + yaml, encoding="utf-8")
    return folder


def error(*argv: object) -> str:
    """The message with which a command of trace-bench ends. `sys.exit(str)` prints it to stderr and exits with 1."""
    from trace_bench.cli import main

    with pytest.raises(SystemExit) as e:
        main([str(word) for word in argv])
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: "), e.value.code
    return e.value.code


def command_line(options: dict) -> list[str]:
    """Options as command-line arguments."""
    args = []
    for key, value in options.items():
        args += [f"--{key}", *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
    return args


def load_merged(base, adapter: Path | None, **kwargs):
    """The base model with an adapter merged into its weights."""
    from trace_bench.engine import models

    model = models.load_model(str(base), None, **kwargs)
    return model if adapter is None else models.merge(model, adapter)[0]


def stop_at(stage: int, trainer: type) -> type:
    """The same method, but killed when a stage is trained and not yet saved."""

    class Killed(trainer):
        def end_stage(self):
            super().end_stage()
            if self.stage.index == stage:
                raise KeyboardInterrupt

    Killed.__module__ = trainer.__module__  # for the manifest it is the same method
    return Killed


def interrupted(trainer: type, step: int, stage: int = 2) -> type:
    """The same method, but stopped before the step after `step`."""

    class Stopped(trainer):
        def training_step(self, *args):
            if (self.stage.index, self.state.global_step) == (stage, step):
                raise KeyboardInterrupt
            return super().training_step(*args)

    Stopped.__module__ = trainer.__module__
    return Stopped


def config_of(method: str) -> type:
    """The config class of a method."""
    from trainers.base import CLConfig

    classes = [v for v in vars(importlib.import_module(f"trainers.{method}")).values() if isinstance(v, type)]
    return max((c for c in classes if issubclass(c, CLConfig)), key=lambda c: len(c.__mro__))


def lock_holder(folder: object) -> subprocess.Popen:
    """Starts a process that holds the training lock of a folder until it is killed."""
    hold = "import sys, time; from pathlib import Path; from trace_bench.waiting import locked\n"
    hold += "with locked(Path(sys.argv[1]), 'train'): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(folder)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def packed(archive: Path, members: list, **fields) -> Path:
    """Writes an archive of (name, content) members. Keyword arguments are fields of the last member of a tar."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in members:
                z.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        return archive
    mode = f"w:{archive.suffix[1:]}".removesuffix(":tar")
    with tarfile.open(archive, mode, format=tarfile.PAX_FORMAT) as t:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items() if (name, content) == members[-1] else ():
                setattr(info, field, value)
            t.addfile(info, io.BytesIO(content))
    return archive
