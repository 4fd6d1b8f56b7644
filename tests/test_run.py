"""Tests of `trace_bench.run`: what is on the disk is whole, and a run is resumed as it was begun or not at all."""

import json
import os
import re
from pathlib import Path

import pytest

from trace_bench import run as run_module
from trace_bench.run import (
    Run,
    RunError,
    Stage,
    fingerprint,
    fresh_dir,
    read_json,
    write_json,
    write_jsonl,
    write_text,
)

MANIFEST = {
    "method": "sequential",
    "tasks": ["trace_cstance", "trace_fomc"],
    "data": {"path": "here", "demo": False},
    "config": {"learning_rate": 1e-4, "epochs": [5, 3]},
    "seed": 1,
}


def changed(**changes):
    """The manifest with some entries replaced; dotted keys as `config__epochs`."""
    manifest = json.loads(json.dumps(MANIFEST))
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = manifest
        for parent in parents:
            node = node[parent]
        node[last] = value
    return manifest


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def boom(*args, **kwargs):
    raise OSError("no space left")


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("write", [write_text, write_json, write_jsonl])
@pytest.mark.parametrize("owner, method", [(os, "fsync"), (Path, "replace")])
def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch, write, owner, method):
    file = tmp_path / "file"
    file.write_text("old", encoding="utf-8")
    monkeypatch.setattr(owner, method, boom)
    with pytest.raises(OSError, match="no space"):
        write(file, "new")
    assert names(tmp_path) == ["file"]
    assert file.read_text(encoding="utf-8") == "old"


def test_writes_make_folders_and_keep_text_as_it_is(tmp_path):
    value = {"prompt": "立场：für\n", "n": 1}
    write_json(tmp_path / "a/b.json", value)
    write_jsonl(tmp_path / "c/d.jsonl", [value, value])
    assert read_json(tmp_path / "a/b.json") == value
    lines = (tmp_path / "c/d.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [value, value]
    assert names(tmp_path / "a") == ["b.json"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("write", [write_json, write_jsonl])
def test_nan_is_refused_and_the_old_file_kept(tmp_path, write, number):
    write(tmp_path / "file", [1])
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write(tmp_path / "file", [number])
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff{}"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(RunError, match=rf"{re.escape(str(file))} is damaged.*[Dd]elete it"):
        read_json(file)


def test_a_fresh_folder_replaces_the_old_one_only_at_the_end(tmp_path):
    target = tmp_path / "adapter"
    for content in ("one", "two"):
        with fresh_dir(target) as tmp:
            (tmp / content).write_text(content, encoding="utf-8")
            assert not (target / content).exists()
        assert names(target) == [content]
    assert names(tmp_path) == ["adapter"]


def test_an_exception_leaves_the_old_folder(tmp_path):
    target = tmp_path / "adapter"
    with fresh_dir(target) as tmp:
        (tmp / "good").touch()
    with pytest.raises(KeyboardInterrupt), fresh_dir(target) as tmp:
        (tmp / "half").touch()
        raise KeyboardInterrupt
    assert names(target) == ["good"]


def test_what_a_killed_program_left_is_not_in_the_next_folder(tmp_path):
    target = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt), fresh_dir(target) as tmp:
        (tmp / "half").touch()
        raise KeyboardInterrupt
    assert not target.exists()
    with fresh_dir(target) as tmp:
        assert names(tmp) == []
        (tmp / "whole").touch()
    assert (names(tmp_path), names(target)) == (["adapter"], ["whole"])


# -------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_changes_with_content_and_name_and_not_with_mtime(tmp_path):
    (tmp_path / "a/sub").mkdir(parents=True)
    file = tmp_path / "a/sub/x"
    file.write_text("1", encoding="utf-8")
    first = fingerprint(tmp_path / "a")
    os.utime(file, (1, 1))
    assert fingerprint(tmp_path / "a") == first
    assert re.fullmatch("[0-9a-f]{16}", first)

    file.write_text("2", encoding="utf-8")
    second = fingerprint(tmp_path / "a")
    file.rename(file.with_name("y"))
    third = fingerprint(tmp_path / "a")
    (tmp_path / "a/z").touch()
    assert len({first, second, third, fingerprint(tmp_path / "a")}) == 4


def test_fingerprint_does_not_depend_on_where_a_folder_is(tmp_path):
    for place in ("a", "b"):
        write_json(tmp_path / place / "x.json", [1])
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a/x.json") == fingerprint(tmp_path / "b/x.json")


def test_nothing_has_no_fingerprint(tmp_path):
    """A checkpoint that is gone would look like one that has changed."""
    with pytest.raises((OSError, RunError), match="nowhere"):
        fingerprint(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------- run


def test_a_run_is_created_once_and_opened_as_it_was(tmp_path):
    made = Run.create(tmp_path / "r", MANIFEST)
    before = (tmp_path / "r/manifest.json").read_bytes()
    assert Run.create(tmp_path / "r", MANIFEST).manifest == Run.open(tmp_path / "r").manifest == made.manifest
    assert (tmp_path / "r/manifest.json").read_bytes() == before
    assert made.manifest.items() >= MANIFEST.items()
    assert made.manifest["packages"] == run_module.package_versions()


def test_another_configuration_is_an_error_that_lists_each_differing_key_with_both_values(tmp_path):
    Run.create(tmp_path, MANIFEST)
    before = (tmp_path / "manifest.json").read_bytes()
    other = changed(seed=2, config__epochs=[5, 7], config__lora_r=8, tasks=["trace_fomc"])
    with pytest.raises(RunError) as e:
        Run.create(tmp_path, other)
    lines = re.findall(r"^  (\S+): (.+) -> (.+)$", str(e.value), re.MULTILINE)
    assert lines == [
        ("config.epochs", "[5, 3]", "[5, 7]"),
        ("config.lora_r", "'absent'", "8"),
        ("seed", "1", "2"),
        ("tasks", "['trace_cstance', 'trace_fomc']", "['trace_fomc']"),
    ]
    assert "another folder" in str(e.value)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_circumstances_may_differ(tmp_path, monkeypatch, caplog):
    first = Run.create(tmp_path, MANIFEST)
    monkeypatch.setattr(run_module, "package_versions", lambda: {"torch": "0.0"})
    monkeypatch.setattr(run_module, "source_commit", lambda: "another")
    again = Run.create(tmp_path, changed(data__path="elsewhere"))
    assert again.manifest == first.manifest
    assert "other package versions" in caplog.text


def test_tuples_and_lists_are_the_same_configuration(tmp_path):
    Run.create(tmp_path, MANIFEST)
    Run.create(tmp_path, changed(config__epochs=(5, 3)))


def test_a_missing_run_names_those_beside_it(tmp_path):
    for name in ("one", "two"):
        Run.create(tmp_path / name, MANIFEST)
    with pytest.raises(RunError, match=r"not a run.*beside it: \S*/one, \S*/two\."):
        Run.open(tmp_path / "three")
    with pytest.raises(RunError, match="beside it: none"):
        Run.open(tmp_path / "no/where")


@pytest.mark.parametrize("content", ["", '{"format": 1,', "[]", "null"])
@pytest.mark.parametrize("opens", [Run.open, lambda path: Run.create(path, MANIFEST)])
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path, opens, content):
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"manifest\.json"):
        opens(tmp_path)


def test_a_manifest_of_a_later_program_is_refused(tmp_path):
    later = run_module.FORMAT + 1
    write_json(tmp_path / "manifest.json", {"format": later})
    with pytest.raises(RunError, match=rf"format {later}.*reads {run_module.FORMAT}"):
        Run.open(tmp_path)


# ------------------------------------------------------------------------------------------------------------- stages


def test_stage_paths(tmp_path):
    run = Run.create(tmp_path, MANIFEST)
    base, first, second = run.stages
    assert [s.path.relative_to(tmp_path).as_posix() for s in run.stages] == [
        "stages/0_base",
        "stages/1_trace_cstance",
        "stages/2_trace_fomc",
    ]
    assert (base.index, base.task, base.is_trained, base.checkpoint) == (0, None, True, None)
    assert (second.index, second.task) == (2, "trace_fomc")
    paths = [first.train_file, first.method_state, first.eval_file("t"), first.samples_file("t")]
    assert [p.relative_to(first.path).as_posix() for p in paths] == [
        "train.json",
        "method_state",
        "eval/t.json",
        "eval/samples/t.jsonl",
    ]
    assert run.is_sequence()


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_stage_is_trained_only_when_its_train_file_exists(tmp_path, kind):
    stage = Stage(1, "1_trace_fomc", "trace_fomc", tmp_path)
    (tmp_path / kind).mkdir()
    assert not stage.is_trained
    with pytest.raises(RunError, match=r"1_trace_fomc is not trained.*train\.json"):
        _ = stage.checkpoint
    write_json(stage.train_file, {})
    assert stage.is_trained
    assert stage.checkpoint == tmp_path / kind


def test_a_dropped_checkpoint_is_an_error_that_says_how_to_keep_it(tmp_path):
    stage = Stage(1, "1_trace_fomc", "trace_fomc", tmp_path)
    write_json(stage.train_file, {})
    with pytest.raises(RunError, match=r"1_trace_fomc is gone.*keep=all"):
        _ = stage.checkpoint


@pytest.mark.parametrize(
    "given, sequence", [(["trace_cstance", "trace_fomc"], True), (["trace_fomc"], False), (["mine"], False)]
)
def test_checkpoints_from_elsewhere_are_stages(tmp_path, given, sequence):
    run = Run.create(tmp_path / "r", {**MANIFEST, "checkpoints": {name: str(tmp_path / name) for name in given}})
    assert [s.name for s in run.stages] == ["0_base", *(f"{i}_{name}" for i, name in enumerate(given, 1))]
    assert all(s.is_trained and s.checkpoint == tmp_path / name for s, name in zip(run.stages[1:], given, strict=True))
    assert [s.task for s in run.stages[1:]] == [n if n in MANIFEST["tasks"] else None for n in given]
    assert run.is_sequence() == sequence
