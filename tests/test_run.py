"""Tests of `trace_bench.run`: files on the disk are complete, and a run is resumed only with its own configuration."""

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
from trace_bench.run import Run, RunError, Stage, read_json, read_jsonl
from trace_bench.versions import package_versions
from trace_bench.waiting import in_use, locked
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


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def boom(*args, **kwargs):
    raise OSError("no space left")


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("owner, method", [(os, "fsync"), (Path, "replace")])
def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch, owner, method):
    file = tmp_path / "file"
    file.write_text("old", encoding="utf-8")
    monkeypatch.setattr(owner, method, boom)
    for write in (write_text, write_json, write_jsonl):
        with pytest.raises(OSError, match="no space"):
            write(file, "new")
    assert names(tmp_path) == ["file"] and file.read_text(encoding="utf-8") == "old"


def test_writes_make_folders_keep_text_as_it_is_and_refuse_nan(tmp_path):
    value = {"prompt": "立场：für\n", "n": 1}
    write_json(tmp_path / "a/b.json", value)
    write_jsonl(tmp_path / "c/d.jsonl", [value, value])
    for write, file in ((write_json, tmp_path / "a/b.json"), (write_jsonl, tmp_path / "c/d.jsonl")):
        for number in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="JSON compliant"):
                write(file, [number])
        assert names(file.parent) == [file.name]
    assert read_json(tmp_path / "a/b.json") == value and "立场：für" in (tmp_path / "a/b.json").read_text("utf-8")
    assert [json.loads(line) for line in (tmp_path / "c/d.jsonl").read_text("utf-8").splitlines()] == [value, value]


def test_a_fresh_folder_replaces_the_old_one_only_at_the_end_and_not_after_an_exception(tmp_path):
    target = tmp_path / "adapter"
    for content in ("one", "two"):
        with pytest.raises(KeyboardInterrupt), fresh_dir(target) as tmp:
            (tmp / "half").touch()
            raise KeyboardInterrupt
        assert names(tmp_path) == (["adapter"] if content == "two" else [])
        with fresh_dir(target) as tmp:
            assert names(tmp) == [] and not (target / content).exists()
            (tmp / content).write_text(content, encoding="utf-8")
            (tmp / content).chmod(0o600)  # as safetensors writes them
        assert (names(tmp_path), names(target)) == (["adapter"], [content])
        assert (target / content).stat().st_mode & 0o666 == target.stat().st_mode & 0o666 != 0o600


def killed_in(code: str, *arguments: object) -> None:
    """Runs Python code and kills it when it prints a line."""
    code = f"import sys, time; from pathlib import Path; from trace_tasks.data import files\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)


def test_the_next_writer_removes_files_of_killed_writers_but_not_of_living_ones(tmp_path):
    code = "def wait(fd): print('there', flush=True); time.sleep(60)\n"
    killed_in(f"{code}files.os.fsync = wait; files.write_text(Path(sys.argv[1]), 'half')", tmp_path / "report.md")
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


def test_the_next_program_removes_folders_of_killed_programs_but_not_of_living_ones(tmp_path):
    code = "with files.temporary_dir(Path(sys.argv[1]), 'merged-'): print(1, flush=True); time.sleep(60)"
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


def test_an_existing_file_at_a_temporary_name_is_not_written_to(tmp_path, monkeypatch):
    """Someone may guess a temporary name. A folder then gets a new name, and a file is not opened."""
    (tmp_path / "victim").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "guessed")
    (tmp_path / ".report.md.guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "report.md", "new")
    assert (tmp_path / "victim").read_text(encoding="utf-8") == "mine"


# ---------------------------------------------------------------------------------------- locks, links and odd files


@pytest.mark.timeout(20)
def test_a_lock_that_is_no_file_is_refused_and_the_target_of_a_link_kept(tmp_path):
    victim, lock = tmp_path / "victim", tmp_path / ".train.lock"
    victim.write_text("mine", encoding="utf-8")
    makers = [lambda: lock.symlink_to(victim), lambda: lock.symlink_to(tmp_path / "new"), lambda: os.mkfifo(lock)]
    for make in makers:
        make()
        with pytest.raises(DataError, match=rf"{re.escape(str(lock))} is a.*Remove it"):
            locked(tmp_path, "train").__enter__()
        lock.unlink()
    assert victim.read_text(encoding="utf-8") == "mine" and names(tmp_path) == ["victim"]
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(DataError, match="so it is not written"):
            files.open_own(path, os.O_RDWR)
    with locked(tmp_path, "train"):
        assert re.fullmatch(r"process \d+ on \S+", lock.read_text(encoding="utf-8"))


def test_a_living_fork_does_not_keep_a_lock(tmp_path):
    """Such a fork is vLLM's engine on a GPU: it starts while a stage is locked and serves the next stages."""
    end, ask = os.pipe()
    with locked(tmp_path, "evaluate"):
        fork = os.fork()
        if not fork:
            os.close(ask)
            os.read(end, 1)
            os._exit(0)
    try:
        assert not in_use(tmp_path, "evaluate")
        with locked(tmp_path, "evaluate"):
            assert in_use(tmp_path, "evaluate")
    finally:
        os.close(ask)
        os.waitpid(fork, 0)


def test_a_hard_linked_lock_file_works_and_keeps_its_content(tmp_path):
    """The second name may be from `cp -al`, or made by an attacker to have a file truncated."""
    (tmp_path / "victim").write_text("secret\nmine", encoding="utf-8")
    (tmp_path / ".train.lock").hardlink_to(tmp_path / "victim")
    with locked(tmp_path, "train"), pytest.raises(RunError, match="in use: another process is running") as e:
        locked(tmp_path, "train").__enter__()
    assert (tmp_path / "victim").read_text(encoding="utf-8") == "secret\nmine" and "secret" not in str(e.value)


@pytest.mark.timeout(20)
def test_no_device_pipe_or_too_long_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("manifest.json", "device"):
        for read in (read_json, read_jsonl):
            with pytest.raises(RunError, match=rf"{name} is a folder, a pipe or a device"):
                read(tmp_path / name)
    with pytest.raises(RunError, match="manifest"):
        Run.open(tmp_path)
    for read, most in ((read_json, reading.MOST_JSON), (read_jsonl, reading.MOST_LINES)):
        with (tmp_path / "x.json").open("wb") as f:
            f.truncate(most + 1)
        with pytest.raises(RunError, match=rf"x\.json is damaged: it has more than {most // 2**20} MiB"):
            read(tmp_path / "x.json")


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
        lambda cache: (cache / "sub" / "a").write_text("contens"),
        lambda cache: (cache / "b").write_text("x"),
        lambda cache: (cache / "sub").rename(cache / "other"),
        lambda cache: ((cache / "b").unlink(), os.mkfifo(cache / "b")),
        lambda cache: cache.rename(cache.with_name("gone")),
        lambda cache: [cache.rename(cache.with_name("gone")), cache.write_text("a file")],
        lambda cache: (cache.parent / ".made.json").unlink(),
        lambda cache: (cache.parent / ".made.json").write_text("{"),
        lambda cache: (cache.parent / ".made.json").write_text('{"b": 3}'),
    ],
)
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    target = tmp_path / "cache" / "made"
    for _ in range(3):
        assert cached_dir(target, fill) == target and content(target) == WHOLE
    damage(target)
    assert cached_dir(target, fill) == target and content(target) == WHOLE
    cached_dir(target, lambda folder: pytest.fail("it is whole"))
    assert not [p for p in names(target.parent) if p.endswith(".tmp")]


def test_a_failed_maker_of_a_cache_leaves_nothing_and_a_killed_one_nothing_that_is_used(tmp_path):
    target = tmp_path / "cache" / "made"
    with pytest.raises(OSError, match="no space"):
        cached_dir(target, boom)
    assert names(target.parent) == []
    code = "def make(f): (f / 'half').touch(); print(1, flush=True); time.sleep(60)\n"
    killed_in(code + "files.cached_dir(Path(sys.argv[1]), make)", target)
    assert len(names(target.parent)) == 1
    assert content(cached_dir(target, fill)) == WHOLE
    assert names(target.parent) == [".made.json", ".made.lock", "made"]


def test_of_two_makers_of_a_cache_the_first_wins_and_no_reader_sees_half_of_it(tmp_path, monkeypatch):
    """This happens on two machines that share a file system."""
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
    inode = target.stat().st_ino
    first_is_done.set()
    thread.join(20)
    assert target.stat().st_ino == inode and content(target) == WHOLE
    assert names(target.parent) == [".made.json", ".made.lock", "made"]


def test_a_fingerprint_depends_only_on_contents_and_names(tmp_path):
    file = tmp_path / "a/sub/x"
    write_text(file, "1")
    first = fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b/sub/x", (1, 1))
    assert fingerprint(tmp_path / "b") == first and fingerprint(tmp_path / "b/sub/x") == fingerprint(file)
    assert re.fullmatch("[0-9a-f]{16}", first)
    file.write_text("2", encoding="utf-8")
    for hidden in (".cache/huggingface/download/x.metadata", ".DS_Store", "sub/.ipynb_checkpoints/x"):
        write_text(tmp_path / "b" / hidden, "now")
    assert fingerprint(tmp_path / "b") == first, "hidden files are no weights"
    second = fingerprint(tmp_path / "a")
    file.rename(file.with_name("y"))
    third = fingerprint(tmp_path / "a")
    (tmp_path / "a/z").touch()
    assert len({first, second, third, fingerprint(tmp_path / "a")}) == 4
    with pytest.raises(DataError, match="nowhere"):  # a missing checkpoint is not a changed one
        fingerprint(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------- run


def test_a_run_is_created_once_and_later_opened_with_its_first_manifest(tmp_path, monkeypatch, caplog):
    made = Run.create(tmp_path / "r", MANIFEST)
    before = (tmp_path / "r/manifest.json").read_bytes()
    assert made.manifest.items() >= MANIFEST.items() and made.manifest["packages"] == package_versions()
    monkeypatch.setattr(run_module, "package_versions", lambda: {"torch": "0.0"})
    monkeypatch.setattr(run_module, "source_commit", lambda: "another")
    config = {**MANIFEST["config"], "epochs": (5, 3)}
    again = Run.create(tmp_path / "r", {**MANIFEST, "data": {"path": "elsewhere", "demo": False}, "config": config})
    assert again.manifest == Run.open(tmp_path / "r").manifest == made.manifest
    assert (tmp_path / "r/manifest.json").read_bytes() == before
    assert "package versions have changed" in caplog.text


def test_a_different_configuration_is_an_error_with_each_key_and_both_values(tmp_path):
    versions = {"trace_cstance": 1.1, "trace_fomc": 1.1}
    Run.create(tmp_path, {**MANIFEST, "task_versions": versions})
    before = (tmp_path / "manifest.json").read_bytes()
    config = {**MANIFEST["config"], "epochs": [5, 7], "lora_r": 8}
    with pytest.raises(RunError, match="a new folder") as e:
        asked = {"tasks": ["trace_fomc"], "task_versions": {"trace_fomc": 1.0}}  # nothing is said about the other task
        Run.create(tmp_path, {**MANIFEST, "seed": 2, "config": config, **asked})
    lines = re.findall(r"^  (\S+): (.+) -> (.+)$", str(e.value), re.MULTILINE)
    assert lines == [
        ("config.epochs", "[5, 3]", "[5, 7]"),
        ("config.lora_r", "'absent'", "8"),
        ("seed", "1", "2"),
        ("task_versions.trace_fomc", "1.1", "1.0"),
        ("tasks", "['trace_cstance', 'trace_fomc']", "['trace_fomc']"),
    ]
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_the_error_of_a_missing_run_names_the_runs_next_to_it(tmp_path):
    for name in ("one", "two"):
        write_json(tmp_path / "runs" / name / "manifest.json", {})
    for folder in (tmp_path / "runs" / "three", tmp_path / "runs"):
        with pytest.raises(RunError, match=r"not a run.*next to it: \S*/one, \S*/two\."):
            Run.open(folder)
    with pytest.raises(RunError, match="next to it: none"):
        Run.open(tmp_path / "no/where")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is damaged.*[Dd]elete it"),
        (b'{"format": 1,', "is damaged"),
        (b"\xff{}", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"format": 2}', "format 2.*reads 1"),
    ],
)
def test_a_damaged_or_newer_manifest_is_an_error_that_says_what_to_do(tmp_path, content, said):
    (tmp_path / "manifest.json").write_bytes(content)
    for opens in (Run.open, lambda path: Run.create(path, MANIFEST)):
        with pytest.raises(RunError, match=rf"manifest\.json.*{said}"):
            opens(tmp_path)


# ------------------------------------------------------------------------------------------------------------- stages


def test_the_base_model_and_each_task_are_stages_in_order(tmp_path):
    run = Run.create(tmp_path, MANIFEST)
    base, first, second = run.stages
    assert [s.path.relative_to(tmp_path).as_posix() for s in run.stages] == [
        "stages/0_base",
        "stages/1_trace_cstance",
        "stages/2_trace_fomc",
    ]
    assert (base.task, base.is_trained, base.checkpoint, first.is_trained) == (None, True, None, False)
    assert (second.index, second.task) == (2, "trace_fomc") and run.is_sequence()


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_stage_is_trained_if_its_train_file_exists_and_a_dropped_checkpoint_is_explained(tmp_path, kind):
    stage = Stage(1, "1_trace_fomc", "trace_fomc", tmp_path)
    (tmp_path / kind).mkdir()
    with pytest.raises(RunError, match=r"1_trace_fomc is not trained.*train\.json"):
        _ = stage.checkpoint
    write_json(stage.train_file, {})
    assert stage.is_trained and stage.checkpoint == tmp_path / kind
    (tmp_path / kind).rmdir()
    with pytest.raises(RunError, match=r"1_trace_fomc is not in.*keep=all"):
        _ = stage.checkpoint


@pytest.mark.parametrize(
    "given, sequence", [(["trace_cstance", "trace_fomc"], True), (["trace_fomc"], False), (["mine"], False)]
)
def test_external_checkpoints_are_stages(tmp_path, given, sequence):
    run = Run(tmp_path / "r", {**MANIFEST, "checkpoints": {name: str(tmp_path / name) for name in given}})
    assert [s.name for s in run.stages] == ["0_base", *(f"{i}_{name}" for i, name in enumerate(given, 1))]
    assert all(s.is_trained and s.checkpoint == tmp_path / name for s, name in zip(run.stages[1:], given, strict=True))
    assert [s.task for s in run.stages[1:]] == [n if n in MANIFEST["tasks"] else None for n in given]
    assert run.is_sequence() == sequence


# -------------------------------------------------------------------------------------------------- runs of version 0.1


def test_a_run_of_version_0_1_opens_with_the_same_numbers(tmp_path, capsys):
    """Version 0.1 made `run_0.1` and its scores.csv: EWC on two demo tasks, measured on three rows each."""
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
