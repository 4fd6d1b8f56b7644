"""The methods: every one trains, resumes and is evaluated; and each does what its paper says."""

import importlib
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, stop_at, train
from safetensors.torch import load_file

from trace_bench import evaluate, report
from trace_bench.engine import models
from trace_bench.run import Run, RunError, read_json
from trace_bench.study import methods
from trace_bench.tasks import load_tasks, training_rows
from trace_tasks import data
from trace_tasks.data.files import write_json
from trace_tasks.tokens import example_ids
from trainers.base import CLConfig, CLTrainer, ConfigError

THREE = ["trace_fomc", "trace_numglue_ds", "trace_numglue_cm"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def method(name: str) -> tuple[type[CLTrainer], type[CLConfig]]:
    """The trainer and the config of a method's file."""
    module = importlib.import_module(f"trainers.{name}")
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    trainers = [v for v in own if issubclass(v, CLTrainer)]
    configs = [v for v in own if issubclass(v, CLConfig)]
    if not configs:
        configs = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, CLConfig)][-1:]
    return (trainers or [CLTrainer])[0], configs[0]


def as_method(spy: type[CLTrainer]) -> type[CLTrainer]:
    """Makes a spy on a trainer the same method as far as the manifest goes."""
    spy.__module__ = spy.__base__.__module__
    return spy


def small(options: dict, name: str, **changes) -> dict:
    """Options for a method on three tasks, with epochs rather than steps where that matters."""
    options = {**options, "tasks": THREE, **changes}
    if name in ("replay", "joint"):
        options = {**options, "max_steps": -1, "num_train_epochs": 1.0}
    own = {
        "ogd": {"ogd_rows": 4, "ogd_size": 6},
        "osf": {"use_peft": False, "learning_rate": 1e-4},
        "pp": {"prompt_tokens": 4},
    }
    return {**options, **own.get(name, {})}


def weights(run: Run, stage: int) -> dict[str, torch.Tensor]:
    (file,) = run.stages[stage].checkpoint.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", [m for m in methods() if m != "icl"])  # which trains nothing: test_icl.py
def test_a_method_killed_and_resumed_ends_in_the_same_bytes_and_is_evaluated(name, options, tmp_path):
    trainer, config = method(name)
    options = small(options, name, test_rows=2)
    whole = train(options, trainer, config)
    again = {**options, "output_dir": str(tmp_path / "again")}
    last = len(whole.stages) - 1
    with pytest.raises(KeyboardInterrupt):
        train(again, stop_at(last, trainer), config)
    assert [s.is_trained for s in Run.open(again["output_dir"]).stages] == [True] * last + [False]
    resumed = train(again, trainer, config)
    for a, b in zip(whole.stages[1:], resumed.stages[1:], strict=True):
        for there, here in ((a.checkpoint, b.checkpoint), (a.method_state, b.method_state)):
            files = sorted(there.glob("*.safetensors"))
            assert [f.read_bytes() for f in files] == [(here / f.name).read_bytes() for f in files], a.name
    evaluate.evaluate(resumed)
    R = report.Results(resumed).R
    seen = np.tril(np.ones((3, 3), dtype=bool))
    seen = {"single": np.eye(3, dtype=bool), "joint": np.ones((1, 3), dtype=bool)}.get(name, seen)
    assert not np.isnan(R[0]).any() and (np.isnan(R[1:]) == ~seen).all()
    report.write_report(resumed)
    assert (resumed.path / "report.md").is_file()


@pytest.mark.parametrize("name", ["ewc", "lwf", "gem", "ogd"])
def test_full_fine_tuning(name, options):
    trainer, config = method(name)
    run = train({**small(options, name), "tasks": THREE[:2], "use_peft": False, "learning_rate": 1e-4}, trainer, config)
    assert run.stages[2].checkpoint.name == "model"
    changed = weights(run, 1), weights(run, 2)
    assert any(not torch.equal(changed[0][k], changed[1][k]) for k in changed[0])


# ------------------------------------------------------------------------------------------------ bounds and baselines


def test_single_does_not_depend_on_the_stage_before(options, tmp_path):
    trainer, config = method("single")
    both = train(options, trainer, config)
    alone = train({**options, "tasks": options["tasks"][1:], "output_dir": str(tmp_path / "alone")}, trainer, config)
    a, b = weights(both, 2), weights(alone, 1)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_joint_is_one_stage_on_all_rows(options):
    trainer, config = method("joint")
    run = train({**small(options, "joint"), "epochs": [1.0, 2.0, 1.0]}, trainer, config)
    assert [s.name for s in run.stages] == ["0_base", "1_joint"]
    record = read_json(run.stages[1].train_file)
    assert record["rows"] == 16 + 2 * 16 + 16 and record["epochs"] == 1
    with pytest.raises(ConfigError, match="whole numbers"):
        train({**small(options, "joint"), "epochs": [1.0, 1.5, 1.0]}, trainer, config)


# --------------------------------------------------------------------------------------------------------------- replay


def answers(trainer: CLTrainer, rows) -> list[str]:
    return [trainer.tokenizer.decode(r["input_ids"]) for r in rows]


def replay_spy():
    """The replay trainer, which notes the rows of each stage and the order in which batches see them."""
    trainer, config = method("replay")

    class Spy(trainer):
        sets, order = {}, {}

        def stage_dataset(self, stage):
            dataset = super().stage_dataset(stage)
            type(self).sets[stage.index] = [tuple(r) for r in dataset["input_ids"]]
            return dataset

        def training_step(self, model, inputs, num_items_in_batch=None):
            rows = type(self).order.setdefault(self.stage.index, [])
            rows += [
                tuple(ids[mask.bool()].tolist())
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            return super().training_step(model, inputs, num_items_in_batch)

    return Spy, config


def test_replay_sees_exactly_its_rows_after_the_stage_s_own(options):
    spy, config = replay_spy()
    options = {**small(options, "replay"), "replay_ratio": 0.25, "replay_choice": "first", "num_train_epochs": 2.0}
    options |= {"alignment_rows": 5, "replay": "after"}
    run = train(options, spy, config)
    own = {t: [tuple(i) for i in rows_of(run, t, options)] for t in THREE}
    root = data.find_data("demo")
    tested = {r["prompt"] for t in THREE for r in data.read_split(root, data.FOLDERS[t], "test")}
    for stage in (1, 2, 3):
        record = read_json(run.stages[stage].train_file)
        assert record["replayed"] == {**dict.fromkeys(THREE[: stage - 1], 4), "alignment": 5}
        earlier = [row for t in THREE[: stage - 1] for row in own[t][:4]]
        assert spy.sets[stage][:16] == own[THREE[stage - 1]]
        assert spy.sets[stage][16:-5] == earlier
        order = spy.order[stage]
        assert sorted(order[:32]) == sorted(2 * own[THREE[stage - 1]]), "two epochs of its own rows first"
        assert sorted(order[:16]) == sorted(order[16:32]) and order[:16] != order[16:32], "shuffled anew"
        assert sorted(order[32:]) == sorted(spy.sets[stage][16:]), "then the replayed rows once"
        texts = [run_tokenizer(options).decode(row) for row in spy.sets[stage]]
        assert not any(t in text for text in texts for t in tested), "no test row is trained on"


def rows_of(run: Run, task: str, options: dict) -> list[list[int]]:
    rows = training_rows(load_tasks([task])[task], options["train_rows"])
    prompts, targets = zip(*rows, strict=True)
    examples = example_ids(run_tokenizer(options), prompts, targets, options["max_prompt_length"], 512)
    return [e["input_ids"] for e in examples]


def run_tokenizer(options: dict):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options["model_name_or_path"])


def test_mixed_replay_is_part_of_every_epoch(options):
    spy, config = replay_spy()
    options = {**small(options, "replay"), "replay": "mixed", "replay_ratio": 0.5, "alignment_data": "none"}
    run = train({**options, "num_train_epochs": 2.0}, spy, config)
    assert read_json(run.stages[3].train_file)["rows"] == 16 + 8 + 8
    assert sorted(spy.order[3]) == sorted(2 * spy.sets[3])
    assert spy.sets[1] == spy.sets[1][:16], "nothing to replay at the first stage"


def test_replay_of_reasoning_rows_and_a_sequence_of_plain_and_reasoning_tasks(options):
    """RCL with replay; and any task of the two families may follow any other."""
    spy, config = replay_spy()
    tasks = ["reasoning_fomc", "trace_numglue_cm", "reasoning_numglue_ds"]
    options = {**small(options, "replay"), "tasks": tasks, "max_answer_length": 256, "max_prompt_length": 512}
    run = train({**options, "replay_ratio": 0.25, "alignment_rows": 2}, spy, config)
    replayed = {"reasoning_fomc": 4, "trace_numglue_cm": 4, "alignment": 2}
    assert read_json(run.stages[3].train_file)["replayed"] == replayed
    texts = [run_tokenizer(options).decode(row) for row in spy.sets[3]]
    assert all("Give your reasoning first" in t and "\nAnswer:" in t for t in texts[:20])
    assert not any("Give your reasoning" in t for t in texts[20:])


@pytest.mark.skipif(
    not (SHARED / "data/trace_lima").is_dir(), reason="the official alignment set is not here (../shared)"
)
def test_the_official_alignment_set(options):
    from trainers.replay import alignment_rows

    _, config = method("replay")
    for path in (SHARED / "data/trace_lima", SHARED / "data/trace_lima/train.json"):
        rows = alignment_rows(config(output_dir="x", alignment_data=str(path), alignment_rows=100))
        assert len(rows) == 100 and all(r["prompt"] and r["answer"] for r in rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replay_ratio": 2.0}, "replay_ratio=2.0"),
        ({"replay": "before"}, "replay='before'"),
        ({"replay_choice": "last"}, "replay_choice='last'"),
        ({"replay_ratio": 0.0, "alignment_data": "none"}, "nothing to replay"),
        ({"alignment_data": "no.json"}, "no alignment set"),
        ({"max_steps": 3}, "max_steps=3"),
    ],
)
def test_replay_checks_its_options_before_anything_starts(options, change, words):
    with pytest.raises((ConfigError, data.DataError), match=words):
        train({**small(options, "replay"), **change}, *method("replay"))
    assert not Path(options["output_dir"]).exists()


def test_another_alignment_set_behind_the_same_path_is_refused(options, tmp_path):
    trainer, config = method("replay")
    file = tmp_path / "own.json"
    write_json(file, [{"prompt": "Say hello.", "answer": "Hello."}] * 3)
    options = {**small(options, "replay"), "tasks": THREE[:1], "alignment_data": str(file)}
    run = train(options, trainer, config)
    assert read_json(run.stages[1].train_file)["replayed"] == {"alignment": 3}
    write_json(file, [{"prompt": "Say hello.", "answer": "Hi."}] * 3)
    with pytest.raises(RunError, match=r"alignment\.fingerprint"):
        train(options, trainer, config)


@pytest.mark.parametrize("how", ["first", "random", "balanced"])
def test_the_choice_of_remembered_rows(how):
    from datasets import Dataset

    from trainers.memory import choose_rows

    # Answer 1 is rare: 4 of 40 rows.
    rows = Dataset.from_list([{"input_ids": [i, 9], "labels": [-100, 1 if i % 10 == 7 else 2]} for i in range(40)])
    chosen = choose_rows(rows, 8, how, seed=3)
    assert chosen["input_ids"] == sorted(chosen["input_ids"]) and len({r[0] for r in chosen["input_ids"]}) == 8
    assert choose_rows(rows, 8, how, seed=3)["input_ids"] == chosen["input_ids"], "the same ones at every stage"
    assert len(choose_rows(rows, 100, how, seed=3)) == 40
    rare = sum(labels[1] == 1 for labels in chosen["labels"])
    if how == "first":
        assert [r[0] for r in chosen["input_ids"]] == list(range(8))
    else:
        assert choose_rows(rows, 8, how, seed=4)["input_ids"] != chosen["input_ids"]
    if how == "balanced":
        assert rare == 4


# ------------------------------------------------------------------------------------------------------------------ EWC


def probe(options, name: str, stage: int, look, **changes):
    """Trains up to a stage and returns what `look(trainer)` sees at its first step, before the gradient is adjusted."""
    trainer, config = method(name)
    seen = []

    class Probe(trainer):
        def adjust_gradients(self, model):
            if self.stage.index == stage and not seen:
                seen.append(look(self, super().adjust_gradients))
            else:
                super().adjust_gradients(model)

    train({**small(options, name, **changes), "tasks": THREE[:stage]}, as_method(Probe), config)
    return seen[0]


EXACT = {"bf16": False, "lora_dropout": 0.0, "dtype": "float32"}


def test_the_ewc_penalty_is_zero_at_the_anchor_and_its_gradient_is_autograd_s(options):
    def look(trainer, adjust):
        # The first step of stage 2 is at the anchor, the end of stage 1.
        before = {n: p.grad.clone() for n, p in trainer.trained().items()}
        adjust(trainer.model)
        anchored = max(
            (p.grad - before[n]).abs().max() / (1e-12 + before[n].abs().max()) for n, p in trainer.trained().items()
        )
        errors, fishers = [], []
        for name, p in trainer.trained().items():
            F = trainer.state_tensors[f"P/{name}"]
            anchor = p.detach().clone()
            moved = (anchor + 0.1 * torch.randn_like(anchor)).requires_grad_()
            penalty = trainer.config.ewc_lambda / 2 * (F * (moved - anchor) ** 2).sum()
            (wanted,) = torch.autograd.grad(penalty, moved)
            got = trainer.penalty_gradient(name, moved)
            errors.append(float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)))
            fishers.append(float(F.sum()))
        return float(anchored), max(errors), min(fishers), max(fishers)

    anchored, error, least, most = probe(options, "ewc", 2, look, **EXACT, ewc_lambda=1.0)
    assert anchored < 1e-5 and error < 1e-3
    assert least >= 0 and most > 0


@pytest.mark.parametrize("online", [True, False])
def test_ewc_state_after_two_tasks(options, online):
    """Both variants need two tensors per parameter; offline they are the sums over the tasks' own anchors."""
    trainer, config = method("ewc")
    fishers, anchors = [], []

    class Spy(trainer):
        def fisher(self):
            result = super().fisher()
            fishers.append(result)
            anchors.append({n: p.detach().clone() for n, p in self.trained().items()})
            return result

    run = train({**small(options, "ewc"), **EXACT, "ewc_online": online, "ewc_gamma": 0.5}, as_method(Spy), config)
    state = load_file(run.stages[2].method_state / "state.safetensors")
    for name in fishers[0]:
        (a, b), (x, y) = (f[name] for f in fishers[:2]), (c[name] for c in anchors[:2])
        P, Q = (0.5 * a + b, (0.5 * a + b) * y) if online else (a + b, a * x + b * y)
        torch.testing.assert_close(state[f"P/{name}"], P)
        torch.testing.assert_close(state[f"Q/{name}"], Q)
    sizes = [sum(f.stat().st_size for f in s.method_state.glob("*")) for s in run.stages[1:]]
    assert len(set(sizes)) == 1, "flat in the number of tasks"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="adapters, rows together"),
        pytest.param({"gradient_checkpointing": True}, id="row by row, since there is no room"),
        pytest.param({"use_peft": False}, id="all parameters, row by row"),
        pytest.param({"lora_modules_to_save": ["lm_head"]}, id="a head, which sees answers alone"),
    ],
)
@pytest.mark.parametrize("weights", ["rows", "tokens"])
def test_the_fisher_information_is_the_squared_gradient_of_the_task_s_rows(options, change, weights):
    trainer, config = method("ewc")
    pairs = []

    class Spy(trainer):
        def fisher(self):
            result = super().fisher()
            rows = self.task_dataset(self.stage.task)
            by_hand = {n: torch.zeros_like(p) for n, p in self.trained().items()}
            for batch in self.batches(rows, 1):
                self.model.zero_grad()
                self.model(**batch).loss.backward()  # transformers' own loss, of one row
                length = int((batch["labels"] != -100).sum())
                items = sum(x != -100 for r in rows["labels"] for x in r) if weights == "tokens" else len(rows) * length
                for n, p in self.trained().items():
                    by_hand[n] += (length * p.grad) ** 2 / items
            self.model.zero_grad()
            pairs.append((result, by_hand))
            return result

    # Rows of different lengths in one batch, the last batch not full.
    rows = {"loss_weights": weights, "tasks": ["trace_py150", "trace_fomc"], "train_rows": 10}
    train({**options, **EXACT, **rows, **change}, Spy, config)
    assert len(pairs) == 2
    for result, by_hand in pairs:
        for name in result:
            torch.testing.assert_close(result[name], by_hand[name], rtol=1e-3, atol=1e-9)


class Known(torch.nn.Module):
    """A language model of six words whose only trained weight is that of a hidden layer; each word follows the last."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden = torch.nn.Embedding(6, 5), torch.nn.Linear(5, 5, bias=False)
        self.head = torch.nn.Linear(5, 6, bias=False)
        self.words.requires_grad_(False)
        self.head.weight.requires_grad_(False)
        self.head.weight *= 4  # far from uniform

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=self.head(torch.tanh(self.hidden(self.words(input_ids)))))

    def fisher_after(self) -> torch.Tensor:
        """The true Fisher information of the next word after each word: all six words, as likely as they are."""
        found = []
        for word in range(6):
            logp = self(torch.tensor([[word]])).logits[0, 0].log_softmax(-1)
            parts = [torch.autograd.grad(x, self.hidden.weight, retain_graph=True)[0] for x in logp]
            found.append(sum(x.exp().detach() * part**2 for x, part in zip(logp, parts, strict=True)))
        return torch.stack(found)


def known_fisher(rows: list[list[int]], model: Known, **changes) -> torch.Tensor:
    """What the trainer makes of rows of a prompt of one word."""
    from accelerate import Accelerator
    from datasets import Dataset

    trainer, config = method("ewc")
    instance = object.__new__(trainer)
    instance.config = instance.args = config(output_dir="x", per_device_train_batch_size=64, ewc_rows=10**6, **changes)
    instance.config.gradient_checkpointing = instance.aux_loss_enabled = False
    instance.model, instance.accelerator, instance.stage = model, Accelerator(cpu=True), SimpleNamespace(task="known")
    instance.model_args = SimpleNamespace(lora_modules_to_save=None, lora_target_parameters=None)
    instance.compute_loss_context_manager = nullcontext
    instance.task_dataset = lambda task: Dataset.from_list(
        [{"input_ids": r, "labels": [-100, *r[1:]]} for r in rows],
    )

    def collate(some):
        pads = [max(len(r["input_ids"]) for r in some) - len(r["input_ids"]) for r in some]
        return {
            "input_ids": torch.tensor([r["input_ids"] + [0] * n for r, n in zip(some, pads, strict=True)]),
            "labels": torch.tensor([r["labels"] + [-100] * n for r, n in zip(some, pads, strict=True)]),
        }

    instance.data_collator = collate
    return instance.fisher()["hidden.weight"]


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("weights", ["rows", "tokens"])
@pytest.mark.parametrize("lengths", [[2], [20], [180], [2, 20, 180]], ids=str)
def test_the_fisher_information_of_a_known_model_whatever_the_length_of_answers(lengths, weights, fisher):
    """The curvature of the loss: in the model's own text both kinds come to the true one, enumerated."""
    torch.manual_seed(0)
    model = Known()
    true = model.fisher_after()
    with torch.no_grad():
        follows = model(torch.arange(6)[None]).logits[0].softmax(-1)
    rows, wanted, tokens = [], [], 0
    for n in lengths:
        text = [torch.arange(800) % 6]
        for _ in range(n):
            text.append(torch.multinomial(follows[text[-1]], 1)[:, 0])
        rows += torch.stack(text, 1).tolist()
    for row in rows:
        positions = true[row[:-1]]
        tokens += len(positions)
        wanted.append(positions.sum(0) if weights == "tokens" else positions.mean(0))
    wanted = sum(wanted) / (tokens if weights == "tokens" else len(rows))
    found = known_fisher(rows, model, loss_weights=weights, ewc_fisher=fisher)
    assert float(found.sum() / wanted.sum()) == pytest.approx(1, abs=0.1)
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0)) > 0.98


def test_only_the_sampled_fisher_information_stays_where_the_data_are_fitted():
    """The three words after which the model is surest: the data's labels have next to no gradient, others have."""
    torch.manual_seed(0)
    model = Known()
    probability, following = model(torch.arange(6)[None]).logits[0].softmax(-1).max(-1)
    words = probability.argsort()[-3:].tolist()
    rows = 800 * [[word, int(following[word])] for word in words]
    empirical, sampled = (float(known_fisher(rows, model, ewc_fisher=k).sum()) for k in ("empirical", "sampled"))
    assert sampled == pytest.approx(float(model.fisher_after()[words].mean(0).sum()), rel=0.15)
    assert empirical < 0.4 * sampled


# ----------------------------------------------------------------------------------------------------------- LwF


def test_the_teacher_of_lwf_is_the_stage_before(options):
    trainer, config = method("lwf")
    seen = {}

    class Spy(trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.stage.index not in seen:
                logits, _ = self.answer_logits(self.model, inputs)
                plain = CLTrainer.compute_loss(self, model, inputs, False, num_items_in_batch)
                taught = self.answer_logits(self.teacher, inputs)[0] if self.teacher else None
                trains = self.teacher is not None and any(p.requires_grad for p in self.teacher.parameters())
                seen[self.stage.index] = (loss.item(), plain.item(), logits.detach(), taught, trains)
            return loss

    train({**small(options, "lwf"), **EXACT}, as_method(Spy), config)
    loss, plain, _, taught, _ = seen[1]
    assert taught is None and loss == plain, "no teacher at the first stage"
    for stage in (2, 3):
        loss, plain, logits, taught, trains = seen[stage]
        # At the first step the student is still the stage before: the teacher's very logits, and no distillation loss.
        torch.testing.assert_close(logits, taught, rtol=1e-3, atol=1e-4)
        assert loss == pytest.approx(plain, rel=1e-3) and not trains


def test_the_distillation_loss_is_the_divergence_from_the_teacher():
    trainer, config = method("lwf")
    instance = object.__new__(trainer)
    instance.config = config(output_dir="x", lwf_temperature=2.0)
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11, requires_grad=True), torch.randn(5, 11)
    loss = instance.distillation(student, teacher)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert instance.distillation(teacher, teacher).abs().max() < 1e-5
    # The paper's loss: the cross entropy of both distributions, sharpened by 1/T; no T^2 in front of either.
    paper = -(p * q.log()).sum()
    gradients = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss.sum(), paper)]
    torch.testing.assert_close(gradients[0], ((q - p) / 2).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert config(output_dir="x").lwf_lambda == 1 and config(output_dir="x").lwf_temperature == 2


# --------------------------------------------------------------------------------------------------- GEM and A-GEM


def gem_step(name: str, gradients: list[torch.Tensor], step: torch.Tensor, **changes) -> torch.Tensor:
    """What a method makes of a step's gradient, given the gradients on the memories."""
    trainer, config = method(name)
    instance = object.__new__(trainer)
    instance.config = made(config, **changes)
    parameter = torch.nn.Parameter(torch.zeros_like(step))
    parameter.grad = step.clone()
    instance.trained = lambda: {"w": parameter}
    instance.memory = {f"task {i}": [i] for i in range(len(gradients))}
    instance.drawn, instance.drawn_evenly = lambda rows: rows, lambda: range(len(gradients))
    instance.loss_gradient = lambda rows, weights=None: {"w": torch.stack([gradients[i] for i in rows]).mean(0)}
    instance.adjust_gradients(None)
    return parameter.grad


@cache
def made(config: type[CLConfig], **changes) -> CLConfig:
    return config(output_dir="x", **changes)


@pytest.mark.parametrize("seed", range(20))
def test_gem_projects_to_what_a_qp_solver_finds(seed):
    from scipy.optimize import minimize

    torch.manual_seed(seed)
    memory = list(torch.randn(1 + seed % 4, 12))
    if seed % 5 == 0:
        memory.append(memory[0].clone())  # two tasks with one gradient: the dual has no unique solution
    step = torch.randn(12)
    step *= 10.0 ** -(seed % 7)  # gradients of language models are small
    memory = [m * 10.0 ** -(seed % 7) for m in memory]
    x = gem_step("gem", memory, step, gem_margin=0.0)
    scale = float(step.norm())
    M = torch.stack(memory).double().numpy() / scale
    g = step.double().numpy() / scale
    if (M @ g >= 0).all():
        assert torch.equal(x, step), "a gradient that does not conflict is left alone"
        return
    # The primal problem of the paper (equation 8): the nearest vector with no negative product.
    wanted = minimize(
        lambda z: ((z - g) ** 2).sum() / 2,
        g,
        jac=lambda z: z - g,
        constraints={"type": "ineq", "fun": lambda z: M @ z, "jac": lambda z: M},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    np.testing.assert_allclose(x.double().numpy() / scale, wanted.x, atol=2e-4)
    assert (M @ (x.double().numpy() / scale) > -1e-5).all()


def test_the_margin_of_gem_is_the_least_weight():
    from trainers.gem import solve_dual

    rng = np.random.default_rng(0)
    for _ in range(20):
        M, g = rng.normal(size=(3, 10)), rng.normal(size=10)
        P, c = M @ M.T, M @ g
        v = solve_dual(P, c, 0.5)
        assert (v >= 0.5).all()
        # Optimal: the slope is zero where v is free and not negative where it is at its bound.
        slope = P @ v + c
        assert (slope > -1e-8).all() and np.abs(slope[v > 0.5 + 1e-9]).max(initial=0) < 1e-8


@pytest.mark.parametrize("seed", range(10))
def test_agem_takes_off_what_conflicts_and_nothing_else(seed):
    torch.manual_seed(seed)
    memory, step = torch.randn(2, 8), torch.randn(8)
    mean = memory.mean(0)
    for g in (step, -step):
        x = gem_step("agem", list(memory), g)
        if g @ mean >= 0:
            assert torch.equal(x, g)
        else:
            assert abs(x @ mean) < 1e-5
            torch.testing.assert_close(x - g, -(g @ mean) / (mean @ mean) * mean)


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_the_memory_gradient_is_the_loss_gradient_of_remembered_rows(options, name):
    def look(trainer, adjust):
        rows = trainer.drawn(next(iter(trainer.memory.values())))
        ours = trainer.loss_gradient(rows)
        kept = {n: p.grad.clone() for n, p in trainer.trained().items()}
        same = all(torch.equal(kept[n], p.grad) for n, p in trainer.trained().items())
        trainer.model.zero_grad()
        (batch,) = trainer.batches(rows, len(rows))
        trainer.model(**batch).loss.backward()
        theirs = {n: p.grad.clone() for n, p in trainer.trained().items()}
        for n, p in trainer.trained().items():
            p.grad = kept[n]
        adjust(trainer.model)
        after = sum(float((ours[n] * p.grad).sum()) for n, p in trainer.trained().items())
        norm = sum(float((g**2).sum()) for g in ours.values())
        texts = answers(trainer, rows)
        return ours, theirs, same, after / norm, texts

    ours, theirs, untouched, product, texts = probe(options, name, 2, look, **EXACT, memory_rows=8)
    assert untouched, "the step's own gradient is left alone"
    for n in ours:
        torch.testing.assert_close(ours[n], theirs[n], rtol=1e-3, atol=1e-7)
    assert product > -1e-4, "the step does not go against the memory"
    assert len(texts) == 8 and all("Stance:" in t for t in texts), "rows of the first task"


def test_the_memory_gradient_of_agem_is_every_task_s(options):
    """Of tasks with answers of 2 and of 180 tokens; by tokens the long ones would be all of it."""

    def look(trainer, adjust):
        texts = [(f"Write about {i}. ", f"{i} is the number that this is about. " * 10) for i in range(12)]
        trainer.memory["long"] = trainer.text_dataset(texts)
        adjust(trainer.model)
        drawn = trainer.drawn_evenly()
        lengths = [sum(x != -100 for x in labels) for labels in drawn["labels"]]
        tasks = [trainer.loss_gradient(drawn.select(rows), weights="rows") for rows in (range(6), range(6, 12))]
        return trainer.against[0], tasks, lengths

    changes = {**EXACT, "max_answer_length": 180, "learning_rate": 1e-3, "memory_rows": 12, "memory_batch_size": 12}
    memory, (short, long), lengths = probe(options, "agem", 2, look, **changes)
    assert lengths == [2] * 6 + [180] * 6, "as many rows of each"
    for name, gradient in memory.items():
        torch.testing.assert_close(gradient, (short[name] + long[name]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_the_step_of_the_optimizer_is_projected_as_well_if_asked(name, options):
    trainer, config = method(name)
    free, bound, conflicts = [], [], []

    class Spy(trainer):
        def project(self, descent):
            from trainers.memory import dot

            start = {n: p.detach() + descent[n] for n, p in self.trained().items()}
            allowed = super().project(descent)

            def worst(step):
                return min(float(dot(m, step) / (dot(m, m) * dot(step, step)).sqrt()) for m in self.against)

            free.append(worst(descent))
            bound.append(worst(allowed))
            self.wanted = {n: start[n] - allowed[n] for n in start}
            return allowed

        def training_step(self, *args, **kwargs):
            self.reached()
            return super().training_step(*args, **kwargs)

        def end_stage(self):
            self.reached()
            conflicts.append(self.record()["projected_optimizer_steps"])

        def reached(self):
            for n, wanted in getattr(self, "wanted", {}).items():
                torch.testing.assert_close(self.trained()[n].detach(), wanted, rtol=0, atol=1e-6)

    options = {**small(options, name), **EXACT, "memory_rows": 8, "max_steps": 8, "learning_rate": 3e-2}
    run = train({**options, "project_step": True}, as_method(Spy), config)
    assert len(free) == 16, "every step from the second task on"
    assert min(free) < -0.01, "Adam goes against the memory, after a gradient that does not"
    assert min(bound) > -1e-3 and sum(conflicts) == sum(f < 0 for f in free)
    assert read_json(run.stages[3].train_file)["projected_optimizer_steps"] == conflicts[2]


# ------------------------------------------------------------------------------------------------------------------ OGD


@pytest.mark.parametrize(("optimizer", "size", "kept"), [("sgd", 200, 4), ("adamw_torch", 200, 4), ("sgd", 3, 3)])
def test_every_step_of_ogd_is_orthogonal_to_what_is_stored(options, optimizer, size, kept):
    trainer, config = method("ogd")
    products, lengths, sizes = [], [], {}

    class Spy(trainer):
        def train(self, **kwargs):
            before = {n: p.detach().clone() for n, p in self.trained().items()}
            result = super().train(**kwargs)
            sizes[self.stage.index] = len(next(iter(self.basis.values()))) if self.basis else 0
            if self.basis:
                step = {n: (p.detach() - before[n]).double() for n, p in self.trained().items()}
                along = sum(self.basis[n].flatten(1).double() @ step[n].flatten() for n in step)
                norm = sum(float((s**2).sum()) for s in step.values()) ** 0.5
                products.append(float(along.abs().max()) / norm)
                lengths.append(norm)
                basis = sum(b.flatten(1).double() @ b.flatten(1).double().T for b in self.basis.values())
                torch.testing.assert_close(basis, torch.eye(len(basis), dtype=torch.float64), atol=1e-4, rtol=0)
            return result

    options = {**small(options, "ogd"), **EXACT, "optim": optimizer, "learning_rate": 1e-2, "ogd_size": size}
    run = train(options, as_method(Spy), config)
    assert sizes == {1: 0, 2: kept, 3: 2 * kept}, "the bound is of each task, and four rows have four gradients"
    assert max(products) < 1e-4 and min(lengths) > 0
    record = read_json(run.stages[3].train_file)
    assert record["directions"] == 2 * kept
    assert record["directions_bytes"] == 2 * kept * 4 * record["trainable_parameters"]
    assert config(output_dir="x").ogd_size == 200, "the paper's"


def test_ogd_stores_the_gradients_of_the_answer_s_logits(options):
    trainer, config = method("ogd")
    seen = []

    class Spy(trainer):
        def end_stage(self):
            super().end_stage()
            rows = self.task_dataset(self.stage.task)
            state = load_file(self.stage.method_state / "state.safetensors")
            (batch,) = self.batches(rows.select([0]))
            answer = batch["labels"][0, 1:] != -100
            logits, target = self.model(**batch).logits[0, :-1][answer], batch["labels"][0, 1:][answer]
            output = logits.gather(1, target[:, None]).mean()
            gradients = torch.autograd.grad(output, list(self.trained().values()))
            parts = {name: g.double() for name, g in zip(self.trained(), gradients, strict=True)}
            inside = sum(state[n].flatten(1).double() @ part.flatten() for n, part in parts.items())
            seen.append((float(inside.square().sum()), float(sum(part.square().sum() for part in parts.values()))))

    options = {**options, **EXACT, "tasks": THREE[:1], "train_rows": 3, "ogd_rows": 3, "ogd_size": 3}
    train(options, as_method(Spy), config)
    inside, whole = seen[0]
    assert inside == pytest.approx(whole, rel=1e-3), "a remembered row's gradient lies within the stored directions"


def test_ogd_refuses_what_no_memory_holds(options, monkeypatch, tmp_path):
    trainer, config = method("ogd")
    options = {**options, "max_steps": 1}
    # What is named as what there is room for is so.
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(ConfigError, match=r"ogd_rows=200 needs .* GiB are free") as refused:
        train(options, trainer, config)
    fits = int(re.search(r"--ogd_size (\d+) --ogd_rows \1\.", str(refused.value))[1])
    assert 0 < fits < 64
    assert train({**options, "ogd_size": fits, "ogd_rows": fits}, trainer, config).stages[2].is_trained
    with pytest.raises(ConfigError, match="GiB are free"):
        train({**options, "output_dir": f"{tmp_path}/b", "ogd_size": fits + 1, "ogd_rows": fits + 1}, trainer, config)


# --------------------------------------------------------------------------------------------------------------- O-LoRA


def deltas(run: Run, stage: int) -> dict[str, torch.Tensor]:
    """The change of each weight by the adapter of a stage, as PEFT merges it."""
    w = weights(run, stage)
    config = read_json(run.stages[stage].checkpoint / "adapter_config.json")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return {n: scale * w[n.replace("lora_A", "lora_B")] @ w[n] for n in w if "lora_A" in n}


@pytest.mark.parametrize("rslora", [False, True])
def test_olora_adds_an_adapter_in_a_subspace_of_its_own_to_the_frozen_ones(options, rslora):
    trainer, config = method("olora")
    begins, logits = {}, []

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            begins[self.stage.index] = {n: p.detach().clone() for n, p in self.trained().items() if "lora_A" in n}

        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.stage.index == 3 and not logits:
                checkpoint = self.run.stages[2].checkpoint
                before = models.load_merged(options["model_name_or_path"], checkpoint, dtype=torch.float32)
                with torch.no_grad():
                    logits.extend(self.answer_logits(m, inputs)[0] for m in (model, before))
            return super().training_step(model, inputs, num_items_in_batch)

    changes = {**EXACT, "use_rslora": rslora, "lora_target_modules": LINEAR}
    run = train({**small(options, "olora"), **changes}, as_method(Spy), config)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)  # a stage begins as the merged model before
    for name, a in begins[1].items():
        # Of random subspaces of this size no direction is shared.
        assert torch.linalg.matrix_rank(torch.cat([a, begins[2][name]])) == 2 * len(a)
    for stage in (2, 3):
        # PEFT keeps them in a set, whose order differs from process to process.
        assert read_json(run.stages[stage].checkpoint / "adapter_config.json")["target_modules"] == sorted(LINEAR)
        assert read_json(run.stages[stage].train_file)["orthogonality_loss"] > 0
        old, new = weights(run, stage - 1), weights(run, stage)
        for name, tensor in new.items():
            before, own = (tensor[:-4], tensor[-4:]) if "lora_A" in name else (tensor[:, :-4], tensor[:, -4:])
            assert torch.equal(before, old[name]), "the earlier adapters are frozen"
            assert own.shape[0 if "lora_A" in name else 1] == 4
        scale = 32 / (4**0.5 if rslora else 4)
        for name, delta in deltas(run, stage).items():
            A, B = new[name], new[name.replace("lora_A", "lora_B")]
            parts = sum(scale * B[:, k : k + 4] @ A[k : k + 4] for k in range(0, 4 * stage, 4))
            torch.testing.assert_close(delta, parts, rtol=1e-4, atol=1e-6)


def test_the_orthogonality_loss_of_olora(options):
    def look(trainer, adjust):
        loss = trainer.orthogonality_loss()
        before = {n: p.grad.clone() for n, p in trainer.trained().items()}
        adjust(trainer.model)
        wanted = {}
        for name, (past, new) in trainer.pairs().items():
            leaf = new.detach().clone().requires_grad_()
            (g,) = torch.autograd.grad((past.detach() @ leaf.T).abs().sum(), leaf)
            wanted[name] = g
        got = {n: trainer.trained()[n].grad - before[n] for n in wanted}
        others = [n for n in before if n not in wanted and not torch.equal(before[n], trainer.trained()[n].grad)]
        past = {n: p for n, p in trainer.model.named_parameters() if ".past." in n}
        for p, new in trainer.pairs().values():  # rows of its own space: nothing overlaps
            new.data -= new.data @ torch.linalg.pinv(p.data) @ p.data
        return loss, got, wanted, others, any(p.requires_grad for p in past.values()), trainer.orthogonality_loss()

    loss, got, wanted, others, past_trains, orthogonal = probe(options, "olora", 2, look, **EXACT, olora_lambda=1.0)
    assert loss > 1 and orthogonal < 1e-3 * loss
    assert wanted and not others and not past_trains
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-4)


def test_olora_refuses_other_adapters(options):
    for change, words in (({"use_peft": False}, "use_peft=false"), ({"use_dora": True}, "use_dora=True")):
        with pytest.raises(ConfigError, match=words):
            train({**options, **change}, *method("olora"))


# -------------------------------------------------------------------------------------------------- gradient methods


@pytest.mark.parametrize("name", ["ewc", "lwf", "gem", "olora"])
def test_accumulation_and_batch_size_take_the_same_step(name, options, tmp_path):
    """The gradient after the method, for 1 x 8 and 4 x 2 rows."""
    trainer, config = method(name)
    gradients = []
    for batch, accumulation in ((8, 1), (2, 4)):
        seen = []

        class Spy(trainer):
            def adjust_gradients(self, model, seen=seen):
                super().adjust_gradients(model)
                if self.stage.index == 2:
                    seen.append({n: p.grad.clone() for n, p in self.trained().items() if p.grad is not None})

        # The first stage is the same in both: its rows in one batch. What differs is the division of the second one.
        first = {**small(options, name), **EXACT, "tasks": THREE[:2], "train_rows": 8, "max_steps": 1}
        first |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}
        first |= {"output_dir": str(tmp_path / f"{batch}"), "optim": "sgd", "learning_rate": 0.1}
        if name in ("gem", "agem"):
            first["memory_rows"] = 8
        train(first, as_method(Spy), config)
        assert len(seen) == 1
        gradients.append(seen[0])
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=5e-3, atol=2e-6)


LENGTHS = ["trace_fomc", "trace_py150", "trace_meetingbank"]


@pytest.mark.parametrize("weights", ["rows", "tokens"])
def test_the_loss_weighs_rows_or_tokens_the_same_however_a_batch_is_split(weights, options, tmp_path):
    """The gradient of a step, against the losses of its rows one by one, with answers of 2 to 180 tokens."""
    trainer, config = method("joint")
    seen, wanted = {}, {}
    splits = {"8 x 1": (9, 1, "random"), "1 x 9": (1, 9, "random"), "3 x 3, by length": (3, 3, "group_by_length")}
    for name, (batch, accumulation, order) in splits.items():

        class Spy(trainer):
            def adjust_gradients(self, model, name=name):
                seen[name] = {n: p.grad.clone() for n, p in self.trained().items()}
                self.model.zero_grad()
                items = 0
                for row in self.batches(self.train_dataset, 1):
                    weight = int((row["labels"] != -100).sum()) if weights == "tokens" else 1
                    (self.model(**row).loss * weight).backward()  # transformers' own loss, of one row
                    items += weight
                wanted[name] = {n: p.grad / items for n, p in self.trained().items()}

        changes = {"tasks": LENGTHS, "train_rows": 3, "max_answer_length": 180, "loss_weights": weights, "max_steps": 1}
        changes |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        changes |= {"train_sampling_strategy": order, "output_dir": str(tmp_path / name)}
        run = train({**options, **EXACT, **changes}, as_method(Spy), config)
        assert read_json(run.stages[1].train_file)["rows"] == 9
    for name in splits:
        for n in wanted[name]:
            torch.testing.assert_close(seen[name][n], wanted[name][n], rtol=1e-3, atol=2e-6)


def test_rows_weigh_the_same_unless_tokens_are_asked_for():
    assert {method(name)[1](output_dir="x").loss_weights for name in methods()} == {"rows"}
    for change in ({"loss_type": "dft"}, {"label_smoothing_factor": 0.1}):
        CLConfig(output_dir="x", loss_weights="tokens", **change)


@pytest.mark.parametrize("name", ["ewc", "gem", "agem", "ogd", "olora"])
def test_sharded_gradients_are_refused_at_the_start(name, options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=f"{name} needs whole gradients, and FSDP"):
        train(options, *method(name))
    assert not Path(options["output_dir"]).exists()
