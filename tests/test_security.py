"""The promises of docs/security.md: keys stay in memory, texts are data, files stay in their folder, no pickles."""

import gzip
import json
import logging
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import traceback
import zipfile
from functools import partial
from pathlib import Path

import pytest
from conftest import load_merged, packed, train
from hypothesis import strategies as st
from judge_server import Server
from made_runs import make_run
from test_fuzz import fuzz

from judges import prompts
from judges.client import Client
from judges.replies import Cache, Reply
from judges.teacher.prompts import FOLDER, read_prompt
from judges.verdict import parse
from trace_bench.cli import main
from trace_bench.engine import models
from trace_bench.engine.models import ModelError
from trace_bench.evaluate import evaluate, external_run
from trace_bench.judgements import KINDS
from trace_bench.keys import refuse_secrets
from trace_bench.run import RunError, read_json, read_jsonl
from trace_bench.tasks import load_tasks, task_manager
from trace_tasks import data
from trace_tasks.data import DataError, demo
from trace_tasks.data.archive import unpack
from trace_tasks.data.files import cached_dir, fresh_dir, write_json, write_jsonl, write_text
from trainers.base import CLConfig, ConfigError

SECRETS = {
    "OPENAI_API_KEY": "sk-sentinel-0123456789abcdef",
    "HF_TOKEN": "hf_sentinel0123456789abcdef",
    "WANDB_API_KEY": "wandb-sentinel-0123456789",
    "ANTHROPIC_API_KEY": "sk-ant-sentinel-0123456789",
}
NOBODY = ["--model", "m", "--base-url", "http://127.0.0.1:1/v1"]


# ----------------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def secrets(monkeypatch, tmp_path, tmp_path_factory, caplog, capfd):
    """Sets keys in the environment. Afterwards no file, log or output contains one of them."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("judges.client.MAX_RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    caplog.set_level(logging.DEBUG)
    printed = []
    yield printed
    out, err = capfd.readouterr()
    logged = map(logging.Formatter().format, caplog.get_records("call"))  # with tracebacks
    printed = "\n".join([*printed, out, err, *logged])
    left = [p for folder in (tmp_path, Path(os.environ["TRACE_CACHE"])) for p in folder.rglob("*") if p.is_file()]
    assert len(left) > 1 and len(printed) > 100, "there is something to look at"
    for name, value in SECRETS.items():
        assert value not in printed, f"{name} was shown"
        assert not [p for p in left if value.encode() in p.read_bytes()], f"{name} was written"
        assert not [p for p in left if value in p.name]


def failed(argv, printed):
    """Runs a command that must fail with an error of ours, and keeps the text that a traceback would show."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    assert str(e.value.code).startswith("error: ")
    printed.append("".join(traceback.format_exception(e.value)))
    return str(e.value.code)


def test_keys_are_in_no_file_log_or_output_of_a_run(secrets, options, tmp_path, monkeypatch):
    """Training, evaluation, judging through every fault, annotation and reports, with servers that echo the key."""
    monkeypatch.chdir(tmp_path)
    options |= {"output_dir": str(tmp_path / "runs" / "mine"), "judged": ["instruct_lima"], "judged_rows": 2}
    options |= {"judged_max_new_tokens": 4, "train_rows": 8, "test_rows": 2, "max_steps": 1, "tasks": ["trace_fomc"]}
    run = train({**options, "hub_token": SECRETS["HF_TOKEN"]})
    main(["evaluate", str(run.path)])
    monkeypatch.setattr(Client, "__init__", _patient(Client.__init__))
    with Server() as server:
        ask = ["judge", run.path, "--model", "m", "--base-url", server.url]
        samples = run.stages[1].samples_file("instruct_lima")
        good, cell = samples.read_bytes(), run.stages[1].eval_file("instruct_lima")
        write_json(cell, {**read_json(cell), "samples": None})  # as older programs: the answers are replaced below
        for fault in ("denied", "long", "down", "slow", "garbled", "html", "deep", "nothing", "cut"):
            write_jsonl(samples, [{**row, "response": f"{fault} FAULT:{fault}"} for row in read_jsonl(samples)])
            assert server.url in failed([*ask, "--stages", "1"], secrets), fault
        samples.write_bytes(good)
        main([str(a) for a in ask])
        assert server.headers[-1]["authorization"] == f"Bearer {SECRETS['OPENAI_API_KEY']}", "the key was used"
        server.batch_fault = "refuse"
        write_jsonl(samples, [{**row, "response": "another"} for row in read_jsonl(samples)])
        failed([*ask, "--batch"], secrets)
        samples.write_bytes(good)
        arguments = ["--model", "m", "--data", "demo", "--tasks", "trace_fomc", "--rows", "2", "--attempts", "1"]
        main(["annotate", "reasoning", *arguments, "--rejected", "keep", "--base-url", server.url])
    key = SECRETS["OPENAI_API_KEY"]
    for url in (
        f"http://user:{key}@127.0.0.1/v1",
        f"{key}@host/v1",
        f"user:{key}@host/v1",
        f"http://host/v1#{key}",
        f"http://host/v1?k={key}",
        f"http://[{key}@host",
        f"http://u:{key}\u2100@host/v1",
    ):
        assert "OPENAI_API_KEY" in failed([*ask[:-1], url], secrets)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    failed(ask[:-2], secrets)
    run.stages[1].eval_file("trace_fomc").unlink()
    for argument in ("hf_token", "token", "api_key"):
        given = json.dumps({argument: SECRETS["HF_TOKEN"]})
        assert argument in failed(["evaluate", run.path, "--engine-args", given], secrets)
    main(["report", str(run.path), "--output", str(tmp_path / "all.csv")])
    main(["status", str(run.path)])
    with pytest.raises(ConfigError) as e:
        CLConfig(output_dir="r", engine_args={"hf_token": SECRETS["HF_TOKEN"]})
    secrets.append("".join(traceback.format_exception(e.value)))


def _patient(init):
    """A client that waits only a moment, so the slow server is a time-out."""

    def quick(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "timeout": 0.3})

    return quick


KEYS = ("sk-0123456789", "sk-a.*b[c](d)\\1", "sk-proj-'\"<&>%s{0}")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_an_error_is_masked(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    client = Client("m", cache=tmp_path / "c.jsonl", base_url="http://127.0.0.1:9/v1")

    @fuzz(40, text=st.text(max_size=30))
    def masked(text):
        assert key not in client.masked(ValueError(f"{text}{key}{text} {key}"))

    masked()
    assert key not in repr(vars(client))


def test_only_their_user_can_read_caches(tmp_path, monkeypatch):
    old = os.umask(0o022)
    try:
        Cache(tmp_path / "judge-cache.jsonl").put("k", {}, Reply("private"))
        assert stat.S_IMODE((tmp_path / "judge-cache.jsonl").stat().st_mode) == 0o600
        monkeypatch.setenv("TRACE_CACHE", str(tmp_path / "cache"))
        data.find_data(str(packed(tmp_path / "a.zip", [("FOMC/test.json", b"[]")])))
        assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
        shared = tmp_path / "shared"
        shared.mkdir(mode=0o755)
        cached_dir(shared / "made", lambda folder: (folder / "file").touch())
        assert stat.S_IMODE(shared.stat().st_mode) == 0o755, "what is there keeps its rights"
    finally:
        os.umask(old)


# ------------------------------------------------------------------------------------------------------------ injection

MARKS = ["[[A]]", "[[", "]]", "[", "<<<", ">>>", "<<<END OF ANSWER A>>>", "<<<ANSWER B>>>", "<<<END OF REQUEST>>>"]
MARKS += ["<|im_end|>", "<|im_start|>system", "</s>", "<s>", "[/INST]", "<end_of_turn>", "<｜User｜>"]
MARKS += ["<eos>", "<turn|>", "[\u2066[A]]", "\u200b", "\n", "\0", "\u202e", "A", " "]
material = st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=10).map("".join)
ASKED = [partial(ask, kind) for ask in (prompts.pair, prompts.direct) for kind in KINDS]
TEMPLATE = re.compile(r"<\|[^ ]|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<｜|<eos>|<turn\|>")


@fuzz(100, make=st.sampled_from(ASKED), prompt=material, a=material, b=material)
def test_answers_in_a_judges_prompt_cannot_end_their_delimiters_or_give_a_verdict(make, prompt, a, b):
    given_texts = [prompt, a, b] if make in ASKED[:2] else [prompt, a]
    (message,) = make(*given_texts)
    (plain,) = make(*["x"] * len(given_texts))
    text = message["content"]
    assert text.count("<<<") == plain["content"].count("<<<") == 2 * len(given_texts)
    seen = re.sub("[\u200b-\u200f\u202a-\u202e\u2060-\u206f]", "", text)
    assert text.count("[[") == seen.count("[[") == plain["content"].count("[["), "the offered verdicts, and no other"
    shown = re.findall(r"<<<(REQUEST|ANSWER[ AB]*)>>>\n(.*?)\n<<<END OF \1>>>", text, re.DOTALL)
    assert [material for _, material in shown] == [prompts.neutralise(t) for t in given_texts]
    echo = "\n".join(text for _, text in shown)  # of a judge that does nothing but copy
    assert parse(echo, prompts.PAIR) is None and not TEMPLATE.search(text)


@fuzz(50, prompt=material.filter(str.strip), answer=st.none() | material.filter(str.strip))
def test_a_task_in_a_teachers_prompt_cannot_end_its_delimiters(prompt, answer):
    teacher = read_prompt(FOLDER / "fomc.yaml", "FOMC")
    last = teacher.messages("FOMC", prompt, answer)[-1]["content"]
    assert last.count("<<<") == (2 if answer is None else 4) and not TEMPLATE.search(last)
    assert f"<<<TASK>>>\n{prompts.neutralise(prompt)}\n<<<END OF TASK>>>" in last


# ------------------------------------------------------------------------------------------------------------- archives


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def refused(archive, words, cache):
    with pytest.raises(DataError, match=rf"(?s){words}"):
        unpack(archive)
    assert not cache.exists() or not list(cache.iterdir()), "nothing is left"


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_member_outside_its_folder_is_refused(tmp_path, cache, kind):
    for name in ("../x", "a/../../x", "/tmp/x", "//x", "..", "./../x"):
        archive = packed(tmp_path / kind, [("FOMC/test.json", b"[]"), (name, b"bad")])
        refused(archive, "points outside", cache)
        assert set(tmp_path.rglob("*")) <= {archive, cache.parent, cache}


def test_links_and_devices_in_archives_are_refused(tmp_path, cache):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        archive = packed(tmp_path / "a.tar", [("FOMC/test.json", b"")], type=kind, linkname="/etc/passwd")
        refused(archive, "link or device", cache)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        info = zipfile.ZipInfo("FOMC")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        z.writestr(info, "/etc")
    refused(tmp_path / "a.zip", "is a link or device", cache)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_that_would_unpack_to_too_much_is_refused_early(tmp_path, cache, monkeypatch, kind):
    monkeypatch.setattr("trace_tasks.data.archive.MOST_BYTES", 100_000)
    bomb = packed(tmp_path / kind, [(f"FOMC/{i}.json", bytes(60_000)) for i in range(2)])
    refused(bomb, "more than .*[Nn]othing was unpacked", cache)
    monkeypatch.setattr("trace_tasks.data.archive.MOST_BYTES", 200_000)
    assert unpack(bomb).is_dir()
    monkeypatch.setattr("trace_tasks.data.archive.MOST_MEMBERS", 1)
    shutil.rmtree(cache)
    refused(bomb, "or 1 files", cache)


def test_a_header_with_a_huge_or_negative_size_is_not_read(tmp_path, cache):
    """The header says that a name has 3 GB. It takes few bytes here, but tarfile alone would reserve memory for all."""
    for size in ("-1", str(10**30)):
        packed(tmp_path / "a.tar", [("FOMC/test.json", b"[]"), ("b", b"x")], pax_headers={"size": size})
        refused(tmp_path / "a.tar", "", cache)
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 3 * 2**30
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        refused(tmp_path / "a.tar", r"a\.tar cannot be unpacked", cache)
    info = tarfile.TarInfo("x")
    info.size = 10**15
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))
    refused(tmp_path / "a.tar.gz", "1000000000000000 bytes", cache)


@pytest.mark.parametrize(
    "name", ["FOMC/" + "n" * 300, "FOMC/a\0b", "FOMC/ü\u202e\u2028😀", "FOMC/\udcff", "FOMC/\n", " ", "-rf", "FOMC/CON"]
)
@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_odd_names_in_archives_are_files_or_errors(tmp_path, cache, kind, name):
    if kind == "a.zip":
        name = name.replace("\udcff", "x")  # zipfile writes no such name
    archive = packed(tmp_path / kind, [("FOMC/test.json", b"[]"), (name, b"x")])
    try:
        root = unpack(archive)
    except DataError as e:
        assert "a." in str(e)
    else:
        assert sum(p.is_file() for p in root.rglob("*")) == 2
    assert all(cache in (p, *p.parents) or p in (archive, cache.parent) for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_any_damage_to_an_archive_is_an_error(tmp_path, monkeypatch, kind):
    whole = packed(
        tmp_path / kind, [(f"FOMC/{s}.json", b'[{"prompt": "p", "answer": "a"}]' * 9) for s in data.SPLITS]
    ).read_bytes()
    monkeypatch.setattr("trace_tasks.data.archive.MOST_BYTES", 2**24)

    place = st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=4))

    @fuzz(60, places=st.lists(place, min_size=1, max_size=4), cut=st.booleans())
    def damaged(places, cut):
        content = bytearray(whole)
        for place, new in places:
            content[place : place + len(new)] = new
        folder = tmp_path / "c"
        shutil.rmtree(folder, ignore_errors=True)
        monkeypatch.setenv("TRACE_CACHE", str(folder / "cache"))
        (tmp_path / kind).write_bytes(content[: places[0][0]] if cut else content)
        try:
            assert unpack(tmp_path / kind).is_relative_to(folder / "cache")
        except DataError as e:
            assert kind in str(e) or "tar archive" in str(e)
        assert {p.name for p in tmp_path.iterdir()} <= {kind, "c"}
        assert not folder.exists() or [p.name for p in folder.iterdir()] == ["cache"]

    damaged()


# ------------------------------------------------------------------------------------------------------ names and links


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", ".x", "a\0b", "a\x1b[2J", "a\u202eb", "a\nb"])
def test_names_that_lead_out_of_the_run_are_refused(tmp_path, options, name, monkeypatch):
    ours = task_manager()  # without lm-eval's own, whose index takes seconds
    monkeypatch.setattr("trace_bench.tasks.task_manager", lambda include_defaults=False: ours)
    with pytest.raises(DataError, match="Unknown task"):
        load_tasks([name])
    with pytest.raises((ConfigError, DataError)):
        train({**options, "tasks": [name]})
    adapter = tmp_path / "adapter"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        write_text(adapter / file, "")
    with pytest.raises(RunError, match="the name becomes a folder"):
        external_run(tmp_path / "r", {name: str(adapter)}, model="m", tasks=["trace_fomc"], settings={})
    manifest = {"format": 1, "method": "m", "data": {"demo": False}, "config": {}, "tasks": ["trace_fomc"]}
    commands = ["evaluate"], ["report"], ["status"], ["judge", "--model", "m"]
    for entry in ({"tasks": [name]}, {"stages": [name]}, {"checkpoints": {name: "/x"}}):
        write_json(tmp_path / "r" / "manifest.json", {**manifest, **entry})
        for command in commands if "tasks" in entry else commands[2:3]:
            with pytest.raises(SystemExit, match="cannot be the name of a task or stage"):
                main([command[0], str(tmp_path / "r"), *command[1:]])
    write_json(tmp_path / "r" / "manifest.json", {**manifest, "checkpoints": {"v": "/x"}, "folders": {"v": name}})
    with pytest.raises(SystemExit, match=r"'folders\.v' is"):  # it would be removed
        main(["evaluate", str(tmp_path / "r"), "--drop", "v"])
    study = tmp_path / "s.yaml"
    study.write_text(json.dumps({"config": "c.yaml", "runs": {name: {"method": "sequential"}}}))
    (tmp_path / "c.yaml").write_text("{}")
    with pytest.raises(SystemExit, match="the name becomes a folder"):
        main(["study", str(study)])
    assert {p.name for p in tmp_path.iterdir()} <= {"r", "s.yaml", "c.yaml", "adapter"}


def test_links_and_pipes_in_a_run_are_replaced_and_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    write_text(victim / "file", "mine")
    run = make_run(tmp_path / "runs", tasks=["trace_fomc"])
    (run.path / "scores.csv").symlink_to(victim / "file")
    os.mkfifo(run.path / "report.md")
    main(["report", str(run.path)])
    assert (run.path / "report.md").is_file() and not (run.path / "scores.csv").is_symlink()
    for name in ("link", ".link.tmp", ".link.x.tmp", f".link.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(victim)
    with fresh_dir(tmp_path / "link") as made:
        (made / "new").touch()
    assert [p.name for p in (tmp_path / "link").iterdir()] == ["new"] and not (tmp_path / "link").is_symlink()
    shutil.rmtree(tmp_path / "link")
    (tmp_path / "link").symlink_to(victim)
    write_text(tmp_path / "link", "x")
    assert not (tmp_path / "link").is_symlink()
    assert [p.name for p in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "command, place",
    [
        ("report", "figures"),
        ("evaluate", "stages"),
        ("evaluate", "stages/0_base/eval/samples"),
        ("evaluate --drop v", "stages"),
        ("judge", "stages/1_trace_cstance/judge"),
        ("train", "stages/1_trace_fomc/.trainer"),
        ("train", "tensorboard/x"),
    ],
)
def test_a_linked_folder_in_a_run_is_refused(tmp_path, options, demo_data, command, place):
    victim = tmp_path / "victim"
    for name in ("eval/trace_fomc.json", "report.md", "matrix.svg", ".evaluate.lock", "progress.json"):
        write_text(victim / name, "mine")
    before = {p: p.read_bytes() for p in victim.rglob("*") if p.is_file()}
    run = Path(options["output_dir"]) if command == "train" else make_run(tmp_path / "runs").path
    for target in (victim, tmp_path / "nowhere"):
        link = run / place
        shutil.rmtree(link, ignore_errors=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
        with pytest.raises((SystemExit, DataError), match=rf"{re.escape(place)} is a link to .*Remove"):
            if command == "train":
                train(options)
            else:
                name, *more = command.split()
                main([name, str(run), *more, *(NOBODY if command == "judge" else [])])
        link.unlink()
    assert {p: p.read_bytes() for p in victim.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.timeout(60)
def test_a_pipe_in_a_run_does_not_block(tmp_path, demo_data):
    run = make_run(tmp_path / "runs")
    for file in (run.stages[0].eval_file("trace_fomc"), run.stages[1].train_file, run.path / "figures" / "matrix.svg"):
        kept = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        file.parent.mkdir(exist_ok=True)
        os.mkfifo(file)
        for command, more in {"report": [], "evaluate": [], "judge": NOBODY}.items():
            with pytest.raises(SystemExit, match=rf"{file.name} is a pipe"):
                main([command, str(run.path), *more])
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)


def test_a_run_on_a_different_disk_can_be_used_through_links(tmp_path, options, run):
    (tmp_path / "disk").mkdir()
    run.path.rename(tmp_path / "disk" / "one")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "disk" / "one")
    run = train({**options, "output_dir": str(tmp_path / "runs" / "linked")})
    main(["report", str(run.path)])
    assert (tmp_path / "disk" / "one" / "report.md").is_file()
    # A moved checkpoint is read through a link. Dropping the checkpoint removes only the link.
    adapter = run.stages[2].path / "adapter"
    adapter.rename(tmp_path / "moved")
    adapter.symlink_to(tmp_path / "moved")
    assert evaluate(run, stages=[2], cells="own") == 1
    run.stages[2].train_file.unlink()
    train({**options, "output_dir": str(run.path)})
    assert not adapter.is_symlink() and (tmp_path / "moved" / "adapter_model.safetensors").is_file()


def test_a_cache_of_replies_that_is_a_link_is_not_written_to(tmp_path):
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "judge-cache.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(DataError, match=r"judge-cache\.jsonl is a link"):
        Cache(tmp_path / "judge-cache.jsonl").put("k", {}, Reply("text"))
    assert (tmp_path / "victim").read_text() == "mine\n"


def test_demo_data_and_annotations_are_not_written_through_links(tmp_path):
    demo.write_demo(tmp_path / "demo")
    (tmp_path / "victim").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "demo" / "README.txt").rename(tmp_path / "readme")
    (tmp_path / "demo" / "README.txt").symlink_to(tmp_path / "readme")
    before = (tmp_path / "readme").read_bytes()
    demo.write_demo(tmp_path / "demo", seed=1)
    assert (tmp_path / "readme").read_bytes() == before
    shutil.rmtree(tmp_path / "demo" / "FOMC")
    (tmp_path / "demo" / "FOMC").symlink_to(tmp_path / "victim")
    with pytest.raises(DataError, match="FOMC is a link"):
        demo.write_demo(tmp_path / "demo")
    with pytest.raises(SystemExit, match="FOMC is a link"):
        main(["annotate", str(tmp_path / "demo"), *NOBODY, "--data", "demo"])
    assert not any((tmp_path / "victim").iterdir())


# ------------------------------------------------------------------------------------------------------- code in models


class Evil:
    """A pickle that writes a file when it is opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def with_pickle(folder, name, target):
    """Replaces the weights in a folder by a pickle of this name."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Evil(target)))
    return folder


@pytest.fixture
def touched(tmp_path):
    target = tmp_path / "it was run"
    pickle.loads(pickle.dumps(Evil(target)))
    assert target.exists(), "the pickle does what the tests say"
    target.unlink()
    yield target
    assert not target.exists(), "code of a model was run"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_a_base_model_in_pickles_is_refused(tmp_path, options, tiny_model, touched, name):
    folder = with_pickle(Path(shutil.copytree(tiny_model, tmp_path / "m")), name, touched)
    with pytest.raises(ModelError, match="only safetensors are loaded"):
        models.resolve_model(str(folder))
    with pytest.raises(ModelError, match="only safetensors are loaded"):
        train({**options, "model_name_or_path": str(folder)})
    with pytest.raises(SystemExit, match="only safetensors"):
        main(["judge", "--calibrate", "--model", str(folder), "--local"])


@pytest.mark.parametrize("kind, name", [("adapter", "adapter_model.bin"), ("full model", "pytorch_model.bin")])
def test_a_checkpoint_in_pickles_is_refused(tmp_path, checkpoints, tiny_model, touched, demo_data, kind, name):
    settings = {"backend": "hf", "test_rows": 1, "max_prompt_length": 64, "max_new_tokens": 2, "chat_template": False}
    folder = checkpoints[kind]
    run = external_run(
        tmp_path / "r", {"mine": str(folder)}, model=str(tiny_model), tasks=["trace_fomc"], settings=settings
    )
    with_pickle(folder, name, touched)
    with pytest.raises(ModelError, match="only safetensors are loaded"):
        evaluate(run)
    with pytest.raises(ModelError, match="only safetensors are loaded"):
        models.load_model(str(tiny_model), folder)
    with pytest.raises(RunError, match=r"no \.safetensors file"):
        external_run(
            tmp_path / "q", {"mine": str(folder)}, model=str(tiny_model), tasks=["trace_fomc"], settings=settings
        )
    # Even with other weights in the folder, PEFT would open the pickle because of its name.
    (folder / "other.safetensors").write_bytes(b"x")
    with pytest.raises((ModelError, OSError)):
        models.load_model(str(tiny_model), folder)
    if kind == "adapter":
        with pytest.raises((ModelError, OSError)):
            load_merged(tiny_model, folder)


def test_training_resumes_only_from_safetensors(options, run, touched):
    run.stages[2].train_file.unlink()
    with_pickle(run.stages[1].path / "adapter", "adapter_model.bin", touched)
    with pytest.raises(ModelError, match="only safetensors are loaded"):
        train(options)


def with_code(folder, target, model_type):
    """Adds code to a folder, as a model on the hub may contain it."""
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(target)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig): model_type = 'evil'\nclass M(LlamaForCausalLM): config_class = C\n"
        "class T(PreTrainedTokenizerFast): pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder)


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_of_a_model_is_not_run(tmp_path, options, tiny_model, touched, model_type, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who asks is answered
    name = with_code(Path(shutil.copytree(tiny_model, tmp_path / "m")), touched, model_type)
    for load in (
        lambda: train({**options, "model_name_or_path": name, "max_steps": 1, "train_rows": 8}),
        lambda: models.load_tokenizer(name),
        lambda: models.load_model(name, None),
        lambda: models.open_tokenizer(name),
    ):
        try:
            load()
        except (ConfigError, ModelError, OSError, ValueError, SystemExit) as e:
            assert "code" in str(e) or "evil" in str(e)
    assert not touched.exists() and "evil" not in sys.modules


def test_the_revision_of_a_hub_model_is_its_commit_and_runs_no_code(tmp_path, tiny_model, touched, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    commit, repo = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    with_code(Path(shutil.copytree(tiny_model, repo / "snapshots" / commit)), touched, "evil")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert models.pinned_revision("some/model") == models.pinned_revision("some/model", commit) == commit
    with pytest.raises(ModelError, match="'other/model': it is not a local folder"):
        models.pinned_revision("other/model")


def test_no_example_serves_on_all_interfaces():
    """VLLM serves on all interfaces by default, so every documented command that starts a server names the loopback."""
    root = Path(__file__).parents[1]
    files = [p for pattern in ("Makefile", "*.md", "*/*.md", "*/*.py", "*/*.yaml") for p in root.glob(pattern)]
    text = "\n".join(p.read_text(encoding="utf-8") for p in files if p != Path(__file__))
    assert "0.0.0.0" not in text.replace("127.0.0.0", "")
    assert set(re.findall(r"--host[\"', =]+([\w.:]+)", text)) == {"127.0.0.1"}
    assert not re.search(r"HTTPServer\(\(\"(?!127\.0\.0\.1)", text)
    assert "`vllm serve MODEL`" not in text


# --------------------------------------------------------------------------------------------------- secrets, anywhere

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc-def"
SECRET_SETTINGS = [
    {"api_key": "x"},
    {"hf_overrides": {"inner": [{"hf_token": "a-b"}]}},
    {"extra_headers": {"Authorization": "anything"}},
    {"extra_headers": {"X-Api-Key": "zz"}},
    {"extra_headers": {"Set-Cookie": "a=b"}},
    {"extra_headers": ["Authorization: Basic dXNlcjpwYXNz"]},
    {"extra_body": {"a": [[{"clientSecret": "s"}]]}},
    {"extra_query": {"subscription-key": "s"}},
    {"extra_query": {"u": "https://h/v1?api_key=abcdef123456"}},
    {"password": 12345},
    {"auth": ["me", "pw"]},
    {"credentials": {"user": "me"}},
    {"token": "t"},
    {"access_key_id": "x"},
    {"refreshTokens": ["a"]},
    {"a": "sk-proj-abcDEF1234567890xyz"},
    {"a": ["b", ("c", "hf_AbCdEfGhIjKlMnOpQr")]},
    {"a": "ghp_abcdefghijklmnop1234"},
    {"a": "AKIAIOSFODNN7EXAMPLE"},
    {"a": "Bearer abcdefgh12"},
    {"a": f"x {JWT}"},
    {"a": "http://me:pw@host/v1"},
    {"a": "https://0123456789abcdef0123@host/v1"},
    {"a": "-----BEGIN RSA PRIVATE KEY-----"},
    {"a": '{"b": {"token": "abc"}}'},
    {"sk-abcdef0123456789abcd": 1},
    {"a": f"at {SECRETS['WANDB_API_KEY']}"},
]
HARMLESS_SETTINGS = [
    {"max_tokens": 5, "pad_token_id": 3, "stop_token_ids": [1], "truncate_prompt_tokens": 4, "logprob_token_ids": [2]},
    {"pad_token": "<pad>", "eos_token": "</s>", "add_bos_token": True, "skip_special_tokens": "yes", "token": None},
    {"tokenizer": "/m/sk", "tokenizer_mode": "hf", "max_num_batched_tokens": 8192, "prompt_cache_key": "study"},
    {"hub_token": "<HUB_TOKEN>", "use_auth_token": False, "author": "x", "lora_target_modules": ["k_proj", "key"]},
    {"model": "org/task-sk-model-7b", "path": "/data/disk-12345678901234567890/hf_models_v2/hf_cache_2024"},
    {"stop": ["\n", "key: value"], "url": "http://localhost:8000/v1", "revision": "0123456789abcdef" * 2 + "01234567"},
    {"repo": "git@github.com:a/b", "chat_template": "{{ bos_token }}{{ token }}"},
]


@pytest.fixture
def known(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def leaves(value):
    """The texts in a JSON value that are no keys."""
    if isinstance(value, dict):
        value = list(value.values())
    return [text for v in value for text in leaves(v)] if isinstance(value, list | tuple) else [str(value)]


@pytest.mark.parametrize("given", SECRET_SETTINGS, ids=repr)
def test_a_secret_is_refused_at_any_depth_and_not_shown(known, given):
    for settings_ in (given, {"deep": [[{"down": given}]]}):
        with pytest.raises(RunError, match="Leave it out") as e:
            refuse_secrets(settings_, "settings")
        assert str(e.value).startswith("settings ") and "sk-abc" not in str(e.value)
        assert not [text for text in leaves(given) if len(text) > 7 and text in str(e.value)]
        assert not e.value.__cause__ and not e.value.__context__


@pytest.mark.parametrize("given", HARMLESS_SETTINGS, ids=repr)
def test_names_that_only_resemble_secrets_are_accepted(known, given):
    refuse_secrets({"settings": [given]}, "settings")


@pytest.mark.parametrize("text", ["a", "sk-", "://", "bearer ", "token=", "eyJ-", "a:", "_-token", "eyJaaaaa.", "{"])
def test_searching_any_text_for_secrets_is_quick(text):
    started = time.process_time()
    refuse_secrets({"a": text * (200_000 // len(text))}, "settings")
    assert time.process_time() - started < 5


@pytest.mark.parametrize("given", [SECRET_SETTINGS[i] for i in (1, 15)], ids=repr)
def test_every_command_refuses_secrets_before_it_writes(known, tmp_path, checkpoints, tiny_model, options, given):
    text, before = json.dumps(given), set(tmp_path.rglob("*"))
    judge_ = ["judge", "--calibrate", "--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--sampling", text]
    teach = ["annotate", tmp_path / "out", *judge_[2:], "--data", "demo"]
    begin = ["evaluate", tmp_path / "r", "--model", tiny_model, "--checkpoint", f"v={checkpoints['adapter']}"]
    begin += ["--tasks", "trace_fomc", "--data", "demo", "--backend", "hf"]
    for command in (
        judge_,
        teach,
        [*begin, "--engine-args", text],
        [*begin, "--chat-template", "--chat-template-args", text],
    ):
        line = failed(command, [])
        assert "Leave it out" in line and not [v for v in SECRETS.values() if v in line], command
    for changes in ({"engine_args": given}, {"chat_template_args": given, "chat_template": True}):
        with pytest.raises((ConfigError, RunError), match="Leave it out"):
            train({**options, **changes, "output_dir": str(tmp_path / "t")})
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.name} <= before


@pytest.mark.parametrize("name", ["sk-proj-abcDEF1234567890xyz", "https://me:pw@host/model", "hf_AbCdEfGhIjKlMnOpQr"])
def test_a_secret_is_refused_as_the_name_of_a_judge(tmp_path, name):
    for more in (["--base-url", "http://127.0.0.1:9/v1"], ["--local"]):
        line = failed(["judge", "--calibrate", "--model", name, *more], [])
        assert "judge's model" in line and name not in line
    study = tmp_path / "s.yaml"
    study.write_text(json.dumps({"config": "c.yaml", "runs": {"a": {"method": "sequential", "run_name": name}}}))
    assert "runs a run_name" in failed(["study", study, "--dry-run"], [])


# ------------------------------------------------------------------------------------------- text from elsewhere, shown

CONTROL = "\x1b]0;owned\x07\x1b[2J\r\x9b1m\0\u202eevil\u2066\u200f\u2028"


def test_control_characters_reach_no_terminal(tmp_path, capsys, monkeypatch):
    """Commands print names in a manifest, errors of servers, and warnings."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run = make_run(tmp_path / "runs", method=f"m{CONTROL}", model={"name": f"a/{CONTROL}\n# x", "revision": CONTROL})
    other = make_run(tmp_path / "runs", name="other\x1b[31m\u202e")
    main(["status", str(run.path)])
    main(["report", str(run.path), str(other.path)])
    main(["report", str(other.path), "--output", str(tmp_path / "x.md")])
    failed(["evaluate", tmp_path / f"none{CONTROL.replace(chr(0), '')}"], lines := [])
    write_json(run.path / "manifest.json", {**run.manifest, "format": CONTROL})
    lines.append(failed(["status", run.path], []))
    lines.append(failed(["judge", run.path, "--model", "m", "--sampling", '{"model": 1, "a\x1b": 2}'], []))
    printed = capsys.readouterr()
    shown = [*lines[1:], printed.out, printed.err, *((tmp_path / name).read_text() for name in ("x.md",))]
    assert all(char.isprintable() or char in "\n\t" for text in shown for char in text)
    assert "\\x1b[2J" in printed.out and "\\u202eevil" in printed.out and "\\x1b" in lines[1]


def test_warnings_and_unexpected_errors_are_printable(tmp_path):
    code = (
        "import logging, sys\nfrom trace_bench.text import prepare_logging\nprepare_logging()\n"
        "logging.getLogger('x').warning('of %s', sys.argv[1])\nraise ValueError(sys.argv[1])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, CONTROL.replace("\0", "")], capture_output=True, cwd=Path(__file__).parents[1]
    )
    text = ended.stderr.decode()
    assert ended.returncode == 1 and "WARNING: of \\x1b]0;owned" in text and "ValueError: \\x1b]0;owned" in text
    assert all(char.isprintable() or char == "\n" for char in text)
