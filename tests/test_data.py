"""Tests of `trace_tasks.data`: errors on bad data name file and row, archives stay in the cache, token ids match."""

import errno
import gzip
import json
import os
import re
import shutil
import tarfile

import pytest
from conftest import packed
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trace_bench import cli
from trace_tasks import data
from trace_tasks.data import Data, DataError, archive, demo, rows
from trace_tasks.tokens import example_ids, prompt_ids

ROWS = [{"prompt": f"frage {i}: für\n", "answer": f"{i}\n"} for i in range(3)]
every_kind = pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRACE_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    """A complete data set in the official layout."""
    for folder in data.FOLDERS.values():
        (tmp_path / "d" / folder).mkdir(parents=True)
        for split in data.SPLITS:
            (tmp_path / "d" / folder / f"{split}.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return tmp_path / "d"


def members(root, prefix=""):
    return [(prefix + p.relative_to(root).as_posix(), p.read_bytes()) for p in sorted(root.rglob("*.json"))]


# --------------------------------------------------------------------------------------------------- where it is


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"TRACE_DATA is not set(.|\n)*demo(.|\n)*BeyonderXX/TRACE(.|\n)*trace-bench data"),
        ("", "TRACE_DATA is not set"),
        ("nowhere", r"TRACE_DATA=nowhere: there is no such(.|\n)*BeyonderXX/TRACE"),
        (".", r"not in the official layout.*C-STANCE.*train\.json"),
    ],
)
def test_a_missing_source_is_an_error_that_says_how_to_get_data(tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    if value is not None:
        monkeypatch.setenv("TRACE_DATA", value)
    with pytest.raises(DataError, match=message):
        data.find_data()


@pytest.mark.parametrize("level", ["", "one", "one/two"])
def test_a_folder_is_found_up_to_two_levels_down(root, tmp_path, monkeypatch, level):
    place = tmp_path / "top" / level
    place.parent.mkdir(parents=True, exist_ok=True)
    root.rename(place)
    monkeypatch.setenv("TRACE_DATA", str(tmp_path / "top"))
    assert data.find_data() == data.find_data(str(place)) == place


def test_demo_data_is_recognised_in_any_folder_and_other_tasks_need_no_data(root, tmp_path):
    demo.write_demo(tmp_path / "mine")
    assert data.open_data(["trace_fomc"], str(tmp_path / "mine")).demo
    assert not data.open_data(["trace_fomc"], str(root)).demo
    assert data.open_data(["gsm8k"]) == Data(None, None, {})
    assert data.open_data(["gsm8k"]).record() == {"path": None, "demo": False, "fingerprint": {}}


@pytest.mark.parametrize("source", ["demo", "archive"])
def test_cached_data_is_made_once_and_again_if_damaged(root, tmp_path, source):
    source = str(packed(tmp_path / "a.zip", members(root))) if source == "archive" else source
    found = data.find_data(source)
    before, made = Data.at(found, data.FOLDERS).fingerprint, found.stat().st_ino
    assert data.find_data(source) == found and found.stat().st_ino == made
    (found / "FOMC" / "train.json").unlink()
    assert data.find_data(source) == found and Data.at(found, data.FOLDERS).fingerprint == before


# ---------------------------------------------------------------------------------------------------- archives


@every_kind
def test_an_archive_with_the_layout_works(root, tmp_path, cache, kind):
    file = packed(tmp_path / f"a.{kind}", members(root, "LLM-CL-Benchmark_500/" if kind == "zip" else ""))
    found = data.find_data(str(file))
    assert cache in found.parents
    unpacked = Data.at(found, data.FOLDERS)
    assert unpacked.check() == {task: dict.fromkeys(data.SPLITS, 3) for task in data.FOLDERS}
    assert unpacked.fingerprint == Data.at(root, data.FOLDERS).fingerprint


def test_an_archive_of_several_data_sets_lists_them(root, tmp_path):
    both = [m for prefix in ("one/", "two/") for m in members(root, prefix)]
    with pytest.raises(DataError, match=r"2 data sets(.|\n)*TRACE_DATA=\S+/one\n  TRACE_DATA=\S+/two"):
        data.find_data(str(packed(tmp_path / "a.zip", both)))


def refused(file, words, cache):
    """Checks that an archive is refused and leaves nothing in the cache."""
    with pytest.raises(DataError, match=rf"{re.escape(file.name)}.*{words}"):
        data.find_data(str(file))
    assert not list(cache.glob("*"))


def with_flag(content, flag, byte):
    """A zip with a field of its first member changed, in both of its headers."""
    content = bytearray(content)
    content[flag] = content[content.find(b"PK\x01\x02") + flag + 2] = byte
    return content


DAMAGES = {
    "zip overwritten": lambda c: c[:49] + b"\xff" * 20 + c[69:],  # the compressed data begins there
    "zip encrypted": lambda c: with_flag(c, 6, 1),
    "zip unknown compression": lambda c: with_flag(c, 8, 99),
    **{f"{kind} truncated": lambda c: c[: len(c) // 2 - 100] for kind in ("zip", "tar", "tar.gz", "tar.xz")},
    "zip something else": lambda c: b"no archive",
    "tar.xz empty": lambda c: b"",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_archive_is_an_error_that_names_it(root, tmp_path, cache, name):
    file = packed(tmp_path / f"a.{name.split()[0]}", members(root))
    file.write_bytes(DAMAGES[name](file.read_bytes()))
    refused(file, "", cache)


@every_kind
def test_a_member_that_is_too_large_is_refused(tmp_path, cache, monkeypatch, kind):
    file = packed(tmp_path / f"a.{kind}", [("FOMC/train.json", bytes(10)), ("FOMC/test.json", bytes(60_000))])
    monkeypatch.setattr(archive, "MOST_ROWS", 50_000)
    refused(file, "has a file of .*Nothing was unpacked", cache)
    monkeypatch.setattr(archive, "MOST_ROWS", 60_000)
    assert (archive.unpack(file) / "FOMC" / "test.json").stat().st_size == 60_000


def test_bytes_after_the_end_of_an_archive_are_read_to_a_limit(tmp_path, cache, monkeypatch):
    whole = packed(tmp_path / "a.tar", [("FOMC/test.json", b"[]")]).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole + bytes(20_000_000)))
    assert archive.unpack(tmp_path / "a.tar.gz").is_dir()
    monkeypatch.setattr(archive, "MOST_BYTES", 10_000_000)
    shutil.rmtree(cache)
    refused(tmp_path / "a.tar.gz", "more than", cache)


@pytest.mark.parametrize(
    ("kind", "number", "words"), [("zip", errno.EDQUOT, "make room"), ("tar.gz", errno.EACCES, "writable")]
)
def test_a_full_disk_is_not_reported_as_a_damaged_archive(root, tmp_path, cache, monkeypatch, kind, number, words):
    file = packed(tmp_path / f"a.{kind}", members(root))

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    for library in (shutil, tarfile):
        monkeypatch.setattr(library, "copyfileobj", full)
    with pytest.raises(SystemExit, match=rf"^error: .*{os.strerror(number)}.*{words}") as e:
        cli.main(["data", str(file)])
    assert "Download it again" not in e.value.code and "\n" not in e.value.code
    assert not list(cache.glob("*")), "nothing half unpacked stays"


# ------------------------------------------------------------------------------------------------------- one file


def dumps(*rows):
    return json.dumps([ROWS[0], *rows]).encode()


BAD_FILES = {
    "not JSON": (b'[{"prompt": ', "is not JSON"),
    "no list": (b'{"prompt": "p", "answer": "a"}', "dict, not a list"),
    "empty list": (b"[]", "an empty list"),
    "too deep": (b"[" * 100_000, "is not JSON"),
    "too large a number": (b"[" + b"1" * 5000 + b"]", "is not JSON"),
    "a key twice": (b'[{"prompt": "p", "prompt": "q", "answer": "a"}]', "has a key twice"),
    "latin-1": (json.dumps(ROWS, ensure_ascii=False).encode("latin-1"), "not UTF-8.*0xfc"),
    "utf-16": (json.dumps(ROWS).encode("utf-16"), "not UTF-8"),
    "no object": (dumps("text"), "row 1: it holds 'text', not"),
    "list of lists": (dumps([ROWS[0]]), "row 1: it holds a list"),
    "no prompt": (dumps({"answer": "a"}), r"row 1: it lacks 'prompt'; its keys are \['answer'\]"),
    "no answer": (dumps({"prompt": "p"}), "row 1: it lacks 'answer'"),
    "a number": (dumps({"prompt": "p", "answer": 7}), "row 1: 'answer' is 7, not a valid string"),
    "no number": (dumps({"prompt": "p", "answer": float("nan")}), "row 1: 'answer' is nan"),
    "null": (dumps({"prompt": None, "answer": "a"}), "row 1: 'prompt' is None, not a valid string"),
    "empty": (dumps({"prompt": "p", "answer": ""}), "row 1: 'answer' is ''.*empty"),
    "blank": (dumps({"prompt": " \n", "answer": "a"}), "row 1: 'prompt' is .*empty"),
    "unknown key": (dumps({"prompt": "p", "answer": "a", "reason": "r"}), "row 1: it has the unknown entry 'reason'"),
    "lone surrogate": (dumps({"prompt": "\ud800", "answer": "a"}), "row 1: 'prompt' .*surrogate"),
}


@pytest.mark.parametrize("content, problem", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_the_row_and_the_problem(root, content, problem):
    file = root / "FOMC" / "eval.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(str(file))}.*{problem}"):
        data.read_split(root, "FOMC", "eval")


def test_a_file_of_rows_that_is_too_large_is_not_read(root, monkeypatch):
    size = (root / "FOMC" / "test.json").stat().st_size
    monkeypatch.setattr(rows, "MOST_ROWS", size)
    assert data.read_split(root, "FOMC", "test") == ROWS
    monkeypatch.setattr(rows, "MOST_ROWS", size - 1)
    with pytest.raises(DataError, match=r"FOMC/test\.json is damaged: it has more than"):
        data.read_split(root, "FOMC", "test")


# --------------------------------------------------------------------------------------------------- all of it


def test_check_lists_all_problems_at_once(root):
    (root / "FOMC/train.json").write_bytes(dumps("text"))
    (root / "Py150/test.json").unlink()
    shutil.rmtree(root / "C-STANCE")
    with pytest.raises(DataError) as e:
        Data.at(root, data.FOLDERS).check()
    assert len(re.findall(r"C-STANCE/\w+\.json is missing.*no such folder", str(e.value))) == 3
    assert re.search(r"FOMC/train\.json, row 1", str(e.value))
    assert re.search(r"Py150/test\.json is missing \(Py150: \['eval\.json', 'train\.json'\]\)", str(e.value))
    assert "5 problem(s)" in str(e.value)
    assert set(Data.at(root, ["trace_meetingbank", "arc_easy"]).check()) == {"trace_meetingbank"}


def test_the_fingerprint_of_a_task_changes_only_with_its_rows(root):
    before = Data.at(root, data.FOLDERS).fingerprint
    (root / "FOMC/notes.txt").touch()
    assert Data.at(root, data.FOLDERS).fingerprint == before
    (root / "FOMC/train.json").write_bytes(dumps(ROWS[2]))
    after = Data.at(root, data.FOLDERS)
    assert [task for task in before if before[task] != after.fingerprint[task]] == ["trace_fomc"]
    assert after.changed({"fingerprint": before, "test": after.tested}) == ["trace_fomc"]


# --------------------------------------------------------------------------------------------------- token ids

VOCABULARY = ["<s>", "</s>", "a", "b", "c", "d", "ab"]
BOS, EOS, A, B, C, D, AB = range(7)


def tokenizer(bos):
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(VOCABULARY)}, [("a", "b")]))
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


with_and_without_bos = pytest.mark.parametrize("bos", [True, False])


@with_and_without_bos
@pytest.mark.parametrize("limit", [None, 4, 3, 2, 1])
def test_prompts_are_cut_on_the_left_and_keep_bos(bos, limit):
    head = [BOS] if bos else []
    room = 9 if limit is None else limit - len(head)
    bare = [[C, D, AB, C, D], [D], [AB, D]]
    expected = [head + ids[max(len(ids) - room, 0) :] for ids in bare]
    assert prompt_ids(tokenizer(bos), ["cdabcd", "d", "abd"], limit) == expected
    if limit == 3:  # a prompt that has BOS gets no second one
        assert prompt_ids(tokenizer(bos), ["<s>cdcd", "cd"], 3) == [[BOS, C, D], [BOS, C, D] if bos else [C, D]]


@with_and_without_bos
def test_only_the_answer_and_eos_have_a_loss(bos):
    head = [BOS] if bos else []
    assert example_ids(tokenizer(bos), ["cd"], ["abc"]) == [
        {"input_ids": [*head, C, D, AB, C, EOS], "labels": [-100] * len([*head, C, D]) + [AB, C, EOS]}
    ]
    # If a token spans prompt and answer, the prompt stays as it is tested; tokenised together they are c ab d.
    (example,) = example_ids(tokenizer(bos), ["ca"], ["bd"])
    assert example["labels"][-3:] == [B, D, EOS] and example["input_ids"][-5:-3] == [C, A]


def test_an_answer_tokenised_alone_gets_no_leading_space():
    made = tokenizer(False)
    made.backend_tokenizer.model = models.BPE({t: i for i, t in enumerate([*VOCABULARY, "Ġ", "Ċ"])}, [("a", "b")])
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.backend_tokenizer.decoder = decoders.ByteLevel()
    (example,) = example_ids(made, ["ca"], ["bd"])
    assert example["labels"] == [-100] * 3 + [B, D, EOS]


@pytest.mark.parametrize("limit, target", [(None, [AB, C, EOS]), (3, [AB, C, EOS]), (2, [AB, C]), (1, [AB])])
def test_an_answer_keeps_its_first_tokens(limit, target):
    (example,) = example_ids(tokenizer(True), ["c"], ["abc"], max_answer=limit)
    assert example["labels"] == [-100, -100, *target]


@settings(deadline=None, max_examples=50)
@given(st.booleans(), st.text("abcd", min_size=1), st.text("abcd", min_size=1), st.integers(1, 6))
def test_a_training_example_has_the_tested_prompt(bos, prompt, answer, limit):
    made = tokenizer(bos)
    for text in (prompt, "<s>" + prompt):
        (example,) = example_ids(made, [text], [answer], limit)
        (tested,) = prompt_ids(made, [text], limit)
        target = example["labels"][len(tested) :]
        assert example["input_ids"] == tested + target
        assert example["labels"][: len(tested)] == [-100] * len(tested)
        assert "".join(made.convert_ids_to_tokens(target)) == answer + "</s>"
