"""Tests of `trace_bench.run`: what is on the disk is whole, and a run is resumed as it was begun or not at all."""

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trace_bench import run as run_module
from trace_bench.cli import main
from trace_bench.run import Run, RunError, Stage, locked, read_json, read_jsonl
from trace_bench.versions import package_versions
from trace_tasks.data import DataError, files, reading
from trace_tasks.data.files import (
    cached_dir,
    fingerprint,
    fresh_dir,
    temporary_dir,
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


def killed_in(code: str, *arguments: object) -> None:
    """Runs Python that prints a line, and kills it then."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)


def test_what_a_killed_writer_left_goes_with_the_next_one_and_what_lives_stays(tmp_path):
    code = "import sys, time; from pathlib import Path; from trace_tasks.data import files\n"
    code += "def wait(fd): print('there', flush=True); time.sleep(60)\n"
    code += "files.os.fsync = wait; files.write_text(Path(sys.argv[1]), 'half')"
    killed_in(code, tmp_path / "report.md")
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.report\.md\.[0-9a-f]{12}\.tmp", left.name)
    (tmp_path / ".report.md.0123.tmp").touch()
    (tmp_path / ".other.md.0123.tmp").touch()
    with left.open("r+") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        write_text(tmp_path / "report.md", "whole")
        assert names(tmp_path) == sorted([left.name, ".other.md.0123.tmp", "report.md"])
    write_text(tmp_path / "report.md", "whole")
    assert names(tmp_path) == [".other.md.0123.tmp", "report.md"]


def test_folders_of_killed_programs_go_with_the_next_one_and_what_lives_stays(tmp_path):
    code = "import sys, time; from pathlib import Path; from trace_tasks.data.files import temporary_dir\n"
    code += (
        "with temporary_dir(Path(sys.argv[1]), 'merged-') as f: (f / 'x').touch(); print(1, flush=True); time.sleep(60)"
    )
    killed_in(code, tmp_path)
    (left,) = tmp_path.iterdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    (tmp_path / "merged-a.tmp").symlink_to(tmp_path / "victim")
    (left / "inside").symlink_to(tmp_path / "victim")
    with temporary_dir(tmp_path, "merged-") as one:
        (one / "file").touch()
        assert not left.exists()
        with temporary_dir(tmp_path, "merged-") as two:
            assert one != two and (one / "file").exists()
    assert names(tmp_path) == ["merged-a.tmp", "victim"] and names(tmp_path / "victim") == ["file"]


def test_a_name_that_was_taken_is_not_written_to(tmp_path, monkeypatch):
    """Whoever guesses a name has it; another one is drawn for a folder, and a file is not opened."""
    (tmp_path / "victim").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "guessed")
    (tmp_path / ".report.md.guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "report.md", "new")
    assert (tmp_path / "victim").read_text(encoding="utf-8") == "mine"


# ---------------------------------------------------------------------------------------- locks, links and odd files


@pytest.mark.parametrize("what", ["train", "evaluate", "judge", "annotate"])
def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path, what):
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / f".{what}.lock"
    for target in (victim, tmp_path / "new"):
        lock.unlink(missing_ok=True)
        lock.symlink_to(target)
        with pytest.raises(DataError, match=rf"{re.escape(str(lock))} is no ordinary file.*remove it"):
            locked(tmp_path / "run", what).__enter__()
    assert victim.read_text(encoding="utf-8") == "mine" and not (tmp_path / "new").exists()
    lock.unlink()
    with locked(tmp_path / "run", what):
        assert re.fullmatch(r"process \d+ on \S+", lock.read_text(encoding="utf-8"))


@pytest.mark.timeout(20)
def test_a_lock_that_is_a_pipe_a_folder_or_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".train.lock")
    (tmp_path / ".judge.lock").mkdir()
    for what in ("train", "judge"):
        with pytest.raises(DataError, match="no ordinary file"):
            locked(tmp_path, what).__enter__()
    with pytest.raises(DataError, match="no ordinary file"):
        files.open_own(Path("/dev/null"), os.O_RDWR)


def test_a_lock_with_a_second_name_is_a_lock_and_keeps_its_content(tmp_path):
    """As after `cp -al`; or it was made to have something else cut."""
    (tmp_path / "victim").write_text("secret\nmine", encoding="utf-8")
    (tmp_path / ".train.lock").hardlink_to(tmp_path / "victim")
    with locked(tmp_path, "train"), pytest.raises(RunError, match="in use: another process began") as e:
        locked(tmp_path, "train").__enter__()
    assert (tmp_path / "victim").read_text(encoding="utf-8") == "secret\nmine" and "secret" not in str(e.value)


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        for read in (read_json, read_jsonl):
            with pytest.raises(RunError, match=rf"{name} is no file but a folder, a pipe or a device"):
                read(tmp_path / name)
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "manifest.json")
    with pytest.raises(RunError, match="manifest"):
        Run.open(tmp_path / "run")


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as f:
        f.truncate(reading.MOST_JSON + 1)
    with pytest.raises(RunError, match=r"x\.json has more than 64 MiB"):
        read_json(tmp_path / "x.json")
    with (tmp_path / "x.json").open("wb") as f:
        f.truncate(reading.MOST_LINES + 1)
    with pytest.raises(RunError, match=r"x\.json has more than 4096 MiB"):
        read_jsonl(tmp_path / "x.json")


# ------------------------------------------------------------------------------------------------------------- caches


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("content", encoding="utf-8")
    (folder / "b").write_text("", encoding="utf-8")


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


WHOLE = {"sub/a": b"content", "b": b""}


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: (cache / "sub" / "a").write_text("conten"),
        lambda cache: (cache / "sub" / "a").write_text("contens"),
        lambda cache: (cache / "sub" / "a").write_text(""),
        lambda cache: (cache / "b").write_text("x"),
        lambda cache: (cache / "b").unlink(),
        lambda cache: (cache / "sub").rename(cache / "other"),
        lambda cache: ((cache / "b").unlink(), (cache / "b").mkdir()),
        lambda cache: ((cache / "b").unlink(), os.mkfifo(cache / "b")),
        lambda cache: [cache.rename(cache.with_name("gone")), cache.mkdir()],
        lambda cache: cache.rename(cache.with_name("gone")),
        lambda cache: [cache.rename(cache.with_name("gone")), cache.write_text("a file")],
        lambda cache: (cache.parent / ".made.json").unlink(),
        lambda cache: (cache.parent / ".made.json").write_text("{"),
        lambda cache: (cache.parent / ".made.json").write_text('{"b": 3}'),
    ],
)
def test_a_cache_that_is_damaged_is_made_again(tmp_path, damage):
    target = tmp_path / "cache" / "made"
    for _ in range(3):
        assert cached_dir(target, fill) == target and content(target) == WHOLE
    damage(target)
    assert cached_dir(target, fill) == target and content(target) == WHOLE
    cached_dir(target, lambda folder: pytest.fail("it is whole"))
    assert {p for p in names(target.parent) if p.endswith(".tmp")} == set()


def test_a_maker_that_fails_leaves_nothing_and_one_that_is_killed_nothing_for_the_next(tmp_path):
    target = tmp_path / "cache" / "made"
    with pytest.raises(OSError, match="no space"):
        cached_dir(target, boom)
    assert names(target.parent) == []
    code = "import sys, time; from pathlib import Path; from trace_tasks.data.files import cached_dir\n"
    code += "def make(f): (f / 'half').touch(); print(1, flush=True); time.sleep(60)\n"
    killed_in(code + "cached_dir(Path(sys.argv[1]), make)", target)
    assert len(names(target.parent)) == 1
    assert content(cached_dir(target, fill)) == WHOLE
    assert names(target.parent) == [".made.json", ".made.lock", "made"]


def test_of_two_makers_with_the_same_number_the_first_wins_and_nobody_reads_half(tmp_path, monkeypatch):
    """As two machines that share a file system."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    target, begun, first_is_done = tmp_path / "cache" / "made", threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        (folder / "half").touch()
        begun.set()
        assert first_is_done.wait(20)
        fill(folder)

    thread = threading.Thread(target=cached_dir, args=(target, slow))
    thread.start()
    assert begun.wait(20)
    assert content(cached_dir(target, fill)) == WHOLE
    with (target / "sub" / "a").open("rb") as reader:
        inode = target.stat().st_ino
        first_is_done.set()
        thread.join(20)
        assert target.stat().st_ino == inode and reader.read() == b"content"
    assert content(target) == WHOLE and names(target.parent) == [".made.json", ".made.lock", "made"]


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
    with pytest.raises((OSError, DataError), match="nowhere"):
        fingerprint(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------- run


def test_a_run_is_created_once_and_opened_as_it_was(tmp_path):
    made = Run.create(tmp_path / "r", MANIFEST)
    before = (tmp_path / "r/manifest.json").read_bytes()
    assert Run.create(tmp_path / "r", MANIFEST).manifest == Run.open(tmp_path / "r").manifest == made.manifest
    assert (tmp_path / "r/manifest.json").read_bytes() == before
    assert made.manifest.items() >= MANIFEST.items()
    assert made.manifest["packages"] == package_versions()


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


# -------------------------------------------------------------------------------------------------- runs of version 0.1


def test_a_run_of_version_0_1_opens_with_the_same_numbers(tmp_path, capsys):
    """Version 0.1 made `run_0.1`, with its scores.csv: EWC on two demo tasks, measured on three rows each."""
    shutil.copytree(Path(__file__).parent / "run_0.1", path := tmp_path / "run_0.1")
    with (path / "scores.csv").open(encoding="utf-8", newline="") as f:
        before = {(row["stage"], row["task"], row["metric"]): float(row["value"]) for row in csv.DictReader(f)}
    main(["report", str(path)])
    with (path / "scores.csv").open(encoding="utf-8", newline="") as f:
        after = {(row["stage"], row["task"], row["metric"]): row["value"] for row in csv.DictReader(f)}
    assert before.keys() <= after.keys()
    assert {key: float(after[key]) for key in before} == pytest.approx(before, abs=1e-12)
    assert "OP_2 8.8, BWT_2 -2.0" in capsys.readouterr().out, "as version 0.1 said"
    main(["status", str(path)])
    assert "2_trace_meetingbank" in capsys.readouterr().out
