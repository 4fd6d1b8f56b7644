"""Replay: which rows are remembered, and in which order they are trained."""

from types import SimpleNamespace

import pytest
from conftest import SHARED, train
from datasets import Dataset
from method_runs import THREE, method, small
from transformers import AutoTokenizer

from trace_bench.run import RunError, read_json
from trace_tasks.data.files import write_json
from trainers.base import CLTrainer


def replay_spy():
    """A replay trainer that records the rows of each stage and their order in the batches."""
    trainer, config = method("replay")

    class Spy(trainer):
        sets, order = {}, {}

        def stage_dataset(self, stage):
            dataset = super().stage_dataset(stage)
            self.sets[stage.index] = [tuple(r) for r in dataset["input_ids"]]
            return dataset

        def training_step(self, model, inputs, num_items_in_batch=None):
            rows = self.order.setdefault(self.stage.index, [])
            rows += [
                tuple(ids[mask.bool()].tolist())
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            return super().training_step(model, inputs, num_items_in_batch)

    return Spy, config


def test_replay_sees_exactly_its_rows_after_the_stage_s_own(options):
    spy, config = replay_spy()
    changes = {"replay_ratio": 0.25, "replay_choice": "first", "num_train_epochs": 2.0, "replay": "after"}
    run = train(small(options, "replay", 3, train_rows=8, **changes), spy, config)
    for stage in (1, 2, 3):
        record, rows, order = read_json(run.stages[stage].train_file), spy.sets[stage], spy.order[stage]
        assert record["replayed"] == {**dict.fromkeys(THREE[: stage - 1], 2), "alignment": 5}
        assert rows[8:-5] == [row for k in range(1, stage) for row in spy.sets[k][:2]]
        assert sorted(order[:16]) == sorted(2 * rows[:8]), "two epochs of its own rows first"
        assert sorted(order[:8]) == sorted(order[8:16]) and order[:8] != order[8:16], "shuffled anew"
        assert sorted(order[16:]) == sorted(rows[8:]), "then the replayed rows once"


def test_a_share_of_an_epoch_below_one_row_is_one_row_before_the_replayed_rows(monkeypatch):
    monkeypatch.setattr(CLTrainer, "_get_train_sampler", lambda self, rows: list(range(len(rows))))
    trainer = method("replay")[0].__new__(method("replay")[0])
    vars(trainer).update(own_rows=8, own_epochs=0.01, train_dataset=Dataset.from_list([{"a": 0}] * 8))
    vars(trainer).update(config=SimpleNamespace(replay="after"), args=SimpleNamespace(seed=0, data_seed=None))
    assert len(list(trainer._get_train_sampler())) == 1, "and no stage without a step"


def test_mixed_replay_is_in_every_epoch_and_takes_plain_and_reasoning_rows(options):
    """RCL with replay: tasks of both families may follow each other in any order."""
    spy, config = replay_spy()
    tasks = ["reasoning_fomc", "trace_numglue_cm", "reasoning_numglue_ds"]
    changes = {"tasks": tasks, "max_answer_length": 256, "max_prompt_length": 512, "train_rows": 8}
    changes |= {"replay": "mixed", "replay_ratio": 0.5, "alignment_data": "none", "num_train_epochs": 2.0}
    run = train(small(options, "replay", **changes), spy, config)
    record = read_json(run.stages[3].train_file)
    assert record["rows"] == 8 + 4 + 4 and record["replayed"] == dict.fromkeys(tasks[:2], 4)
    assert sorted(spy.order[3]) == sorted(2 * spy.sets[3])
    assert len(spy.sets[1]) == 8, "nothing to replay at the first stage"
    decode = AutoTokenizer.from_pretrained(options["model_name_or_path"]).decode
    texts = [decode(row) for row in spy.sets[3]]
    assert all("Give your reasoning first" in t and "\nAnswer:" in t for t in texts[:12])
    assert not any("Give your reasoning" in t for t in texts[12:])


@pytest.mark.skipif(
    not (SHARED / "data/trace_lima").is_dir(), reason="the official alignment set is not here (../shared)"
)
def test_the_official_alignment_set_is_read_from_a_folder_or_a_file():
    from trainers.replay import alignment_rows

    for path in (SHARED / "data/trace_lima", SHARED / "data/trace_lima/train.json"):
        rows = alignment_rows(method("replay")[1](output_dir="x", alignment_data=str(path), alignment_rows=100))
        assert len(rows) == 100 and all(r["prompt"] and r["answer"] for r in rows)


def test_a_changed_alignment_set_at_the_same_path_is_refused(options, tmp_path):
    file = tmp_path / "own.json"
    write_json(file, [{"prompt": "Say hello.", "answer": "Hello."}] * 3)
    options = small(options, "replay", 1, alignment_data=str(file))
    run = train(options, *method("replay"))
    assert read_json(run.stages[1].train_file)["replayed"] == {"alignment": 3}
    write_json(file, [{"prompt": "Say hello.", "answer": "Hi."}] * 3)
    with pytest.raises(RunError, match=r"alignment\.fingerprint"):
        train(options, *method("replay"))


@pytest.mark.parametrize("how", ["first", "random", "balanced"])
def test_remembered_rows_are_the_first_or_seeded_random_or_balanced_over_answers(how):
    from trainers.memory import choose_rows

    # Answer 1 is rare: 4 of 40 rows. All prompts have different lengths.
    rows = [{"input_ids": [i] * i + [i, 9], "labels": [-100] * i + [-100, 1 + (i % 10 != 7)]} for i in range(40)]
    rows = Dataset.from_list(rows)
    chosen = choose_rows(rows, 8, how, seed=3)
    assert chosen["input_ids"] == sorted(chosen["input_ids"]) and len({r[0] for r in chosen["input_ids"]}) == 8
    assert choose_rows(rows, 8, how, seed=3)["input_ids"] == chosen["input_ids"], "the same ones at every stage"
    assert len(choose_rows(rows, 100, how, seed=3)) == 40
    other = choose_rows(rows, 8, how, seed=4)["input_ids"] != chosen["input_ids"]
    assert other if how != "first" else [r[0] for r in chosen["input_ids"]] == list(range(8))
    assert how != "balanced" or sum(labels[-1] == 1 for labels in chosen["labels"]) == 4
