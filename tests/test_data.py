"""Tests of `trace_bench.data`: bad data is named with file and row, archives stay in the cache, token ids match."""

import errno
import io
import json
import os
import re
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from trace_bench import cli, data
from trace_bench.data import DataError
from trace_tasks.tokens import example_ids, prompt_ids

ROWS = [{"prompt": f"frage {i}: für\n", "answer": f"{i}\n"} for i in range(3)]
SHARED = Path(__file__).parents[2] / "shared" / "data" / "trace"
ORDINARY = 0o644 << 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRACE_DATA", raising=False)
    return tmp_path / "cache"


def layout(root, rows=ROWS):
    for folder in data.FOLDERS.values():
        (root / folder).mkdir(parents=True)
        for split in data.SPLITS:
            (root / folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


def pack(archive, members):
    """Writes a zip or tar of (name, content) members; content None makes a symbolic link."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in members:
                info = zipfile.ZipInfo(name)
                info.external_attr = ORDINARY if content is not None else (stat.S_IFLNK | 0o777) << 16
                z.writestr(info, content or "../../outside", zipfile.ZIP_DEFLATED)
        return archive
    with tarfile.open(archive, f"w:{archive.suffix[1:]}".removesuffix(":tar")) as t:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "../../outside"
            t.addfile(info, io.BytesIO(content or b""))
    return archive


def members(tmp_path, prefix=""):
    root = tmp_path / "source"
    if not root.exists():
        layout(root)
    return [(prefix + p.relative_to(root).as_posix(), p.read_bytes()) for p in sorted(root.rglob("*.json"))]


def files(root, cache):
    return sorted(p for p in root.rglob("*") if cache not in [p, *p.parents])


# --------------------------------------------------------------------------------------------------- where it is


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_source_the_error_says_how_to_get_data(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("TRACE_DATA", value)
    with pytest.raises(DataError, match=r"TRACE_DATA is not set(.|\n)*demo(.|\n)*BeyonderXX/TRACE(.|\n)*make data"):
        data.find_data()


def test_a_path_that_is_not_there_is_named_and_how_to_get_data(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no such(.|\n)*BeyonderXX/TRACE") as e:
        data.find_data(str(tmp_path / "nowhere"))
    assert "is not set" not in str(e.value)


def test_a_folder_in_no_layout_is_an_error_that_names_the_layout(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"not in the official layout.*C-STANCE.*train\.json"):
        data.find_data(str(tmp_path))


@pytest.mark.parametrize("level", ["", "one", "one/two"])
def test_a_folder_is_found_up_to_two_levels_down(tmp_path, monkeypatch, level):
    root = layout(tmp_path / "top" / level)
    monkeypatch.setenv("TRACE_DATA", str(tmp_path / "top"))
    assert data.find_data() == data.find_data(str(root)) == root


def test_the_demo_is_made_once_and_again_identical(cache):
    root = data.find_data("demo")
    assert data.is_demo(root)
    first, made = data.data_fingerprint(root, data.FOLDERS), (root / "FOMC").stat().st_mtime_ns
    assert data.find_data("demo") == root
    assert (root / "FOMC").stat().st_mtime_ns == made
    root.rename(cache / "old")
    assert data.data_fingerprint(data.find_data("demo"), data.FOLDERS) == first
    data.check(root, data.FOLDERS)


def test_demo_data_is_known_wherever_it_lies(tmp_path):
    from trace_bench.demo import write_demo

    write_demo(tmp_path / "mine")
    assert data.is_demo(data.find_data(str(tmp_path / "mine")))
    assert not data.is_demo(layout(tmp_path / "other"))


# ---------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
@pytest.mark.parametrize("prefix", ["", "LLM-CL-Benchmark_500/"])
def test_an_archive_with_the_layout_works(tmp_path, cache, name, prefix):
    archive = pack(tmp_path / name, members(tmp_path, prefix))
    root = data.find_data(str(archive))
    assert cache in root.parents
    assert data.check(root, data.FOLDERS) == {task: dict.fromkeys(data.SPLITS, 3) for task in data.FOLDERS}
    assert data.data_fingerprint(root, data.FOLDERS) == data.data_fingerprint(tmp_path / "source", data.FOLDERS)
    assert data.find_data(str(archive)) == root


def test_an_archive_of_several_data_sets_lists_them(tmp_path):
    both = [m for prefix in ("one/", "two/") for m in members(tmp_path, prefix)]
    with pytest.raises(DataError, match=r"2 data sets(.|\n)*TRACE_DATA=\S+/one\n  TRACE_DATA=\S+/two"):
        data.find_data(str(pack(tmp_path / "a.zip", both)))


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("bad", ["absolute", "../outside", "x/../../outside", "link"])
def test_an_archive_that_points_outside_is_refused_and_writes_nothing_there(tmp_path, cache, kind, bad):
    name = str(tmp_path / "outside") if bad == "absolute" else bad
    archive = pack(tmp_path / f"a.{kind}", [*members(tmp_path), (name, None if bad == "link" else b"bad")])
    before = files(tmp_path, cache)
    with pytest.raises(DataError, match=rf"a\.{kind}.*{re.escape(repr(name))}.*nothing was unpacked"):
        data.find_data(str(archive))
    assert files(tmp_path, cache) == before
    assert not list(cache.glob("data-*"))


def overwritten(content):
    """Damages the compressed data: in a zip from its first byte on, after a header of 30 bytes and the name."""
    start = 30 + len("20Minuten/eval.json")
    return content[:start] + b"\xff" * 20 + content[start + 20 :]


def truncated(content):
    return content[: len(content) // 2 - 100]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("damage", [overwritten, truncated, lambda c: b"no archive", lambda c: b""])
def test_a_damaged_archive_is_an_error_that_names_it(tmp_path, cache, kind, damage):
    archive = pack(tmp_path / f"a.{kind}", members(tmp_path))
    archive.write_bytes(damage(archive.read_bytes()))
    before = files(tmp_path, cache)
    with pytest.raises(DataError, match=rf"a\.{kind}"):
        data.find_data(str(archive))
    assert files(tmp_path, cache) == before
    assert not list(cache.glob("data-*"))


@pytest.mark.parametrize("flag, byte", [(6, 1), (8, 99)], ids=["encrypted", "unknown compression"])
def test_a_zip_that_cannot_be_read_here_is_an_error_that_names_it(tmp_path, flag, byte):
    archive = pack(tmp_path / "a.zip", members(tmp_path))
    content = bytearray(archive.read_bytes())
    content[flag] = content[content.find(b"PK\x01\x02") + flag + 2] = byte
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip"):
        data.find_data(str(archive))


# ------------------------------------------------------------------------------------------------------- one file


def dumps(*rows):
    return json.dumps([ROWS[0], *rows]).encode()


BAD_FILES = {
    "not JSON": (b'[{"prompt": ', "is not JSON"),
    "no list": (b'{"prompt": "p", "answer": "a"}', "dict, not a list"),
    "empty list": (b"[]", "an empty list"),
    "empty file": (b"", "is not JSON"),
    "too deep": (b"[" * 100_000, "is not JSON"),
    "too large a number": (b"[" + b"1" * 5000 + b"]", ""),
    "latin-1": (json.dumps(ROWS, ensure_ascii=False).encode("latin-1"), "not UTF-8.*0xfc"),
    "utf-16": (json.dumps(ROWS).encode("utf-16"), "not UTF-8"),
    "no object": (dumps("text"), "row 1: .*found str"),
    "no prompt": (dumps({"answer": "a"}), "row 1: no 'prompt'.*'answer'"),
    "no answer": (dumps({"prompt": "p"}), "row 1: no 'answer'.*'prompt'"),
    "a number": (dumps({"prompt": "p", "answer": 7}), r"row 1: 'answer' is int \(7\)"),
    "null": (dumps({"prompt": None, "answer": "a"}), "row 1: 'prompt' is NoneType"),
    "empty": (dumps({"prompt": "p", "answer": ""}), "row 1: 'answer' is empty"),
    "blank": (dumps({"prompt": " \n", "answer": "a"}), "row 1: 'prompt' is empty"),
    "unknown key": (dumps({"prompt": "p", "answer": "a", "reason": "r"}), r"row 1: unknown keys \['reason'\]"),
    "lone surrogate": (dumps({"prompt": "\ud800", "answer": "a"}), "row 1: 'prompt' .*surrogate"),
}


@pytest.mark.parametrize("content, problem", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_the_row_and_the_problem(tmp_path, content, problem):
    file = layout(tmp_path / "d") / "FOMC" / "eval.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(str(file))}.*{problem}"):
        data.read_split(tmp_path / "d", "FOMC", "eval")


def test_a_byte_order_mark_is_accepted(tmp_path):
    file = layout(tmp_path / "d") / "FOMC" / "eval.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert data.read_split(tmp_path / "d", "FOMC", "eval") == ROWS


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.sampled_from(["prompt", "answer"]) | st.text(), v),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    (root := tmp_path_factory.mktemp("split") / "FOMC").mkdir()
    return root


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"prompt": text, "answer": text}), min_size=1), st.booleans())
def test_valid_rows_are_read_as_they_were_written(folder, rows, ascii_only):
    (folder / "test.json").write_text(json.dumps(rows, ensure_ascii=ascii_only), encoding="utf-8")
    assert data.read_split(folder.parent, "FOMC", "test") == rows


@settings(deadline=None)
@given(st.binary() | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_give_rows_or_a_data_error(folder, content):
    (folder / "test.json").write_bytes(content)
    try:
        assert isinstance(data.read_split(folder.parent, "FOMC", "test"), list)
    except DataError as e:
        assert "test.json" in str(e)


# --------------------------------------------------------------------------------------------------- all of it


def test_check_lists_all_problems_at_once(tmp_path):
    root = layout(tmp_path / "d")
    (root / "FOMC/train.json").write_bytes(dumps("text"))
    (root / "Py150/test.json").unlink()
    for file in (root / "C-STANCE").iterdir():
        file.unlink()
    (root / "C-STANCE").rmdir()
    with pytest.raises(DataError) as e:
        data.check(root, data.FOLDERS)
    assert len(re.findall(r"C-STANCE/\w+\.json is missing.*no such folder", str(e.value))) == 3
    assert re.search(r"FOMC/train\.json, row 1", str(e.value))
    assert re.search(r"Py150/test\.json is missing \(Py150: \['eval\.json', 'train\.json'\]\)", str(e.value))
    assert "5 problem(s)" in str(e.value)
    assert set(data.check(root, ["trace_meetingbank", "arc_easy"])) == {"trace_meetingbank"}


def test_the_fingerprint_of_a_task_changes_with_its_rows_and_with_nothing_else(tmp_path):
    root = layout(tmp_path / "d")
    before = data.data_fingerprint(root, data.FOLDERS)
    assert set(before) == set(data.FOLDERS)
    (root / "FOMC/notes.txt").touch()
    assert data.data_fingerprint(root, data.FOLDERS) == before
    (root / "FOMC/train.json").write_bytes(dumps(ROWS[2]))
    after = data.data_fingerprint(root, data.FOLDERS)
    assert [task for task in before if before[task] != after[task]] == ["trace_fomc"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the TRACE data (shared/data/trace) is not beside the repository")
def test_the_real_data_passes():
    sizes = data.check(SHARED, data.FOLDERS)
    assert set(sizes) == set(data.FOLDERS)


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
    texts = ["cdabcd", "d", "abd"]
    bare = [[C, D, AB, C, D], [D], [AB, D]]
    assert prompt_ids(tokenizer(bos), texts, limit) == [head + ids[max(len(ids) - room, 0) :] for ids in bare]


@with_and_without_bos
def test_a_prompt_that_has_bos_gets_no_second_one(bos):
    assert prompt_ids(tokenizer(bos), ["<s>cdcd", "cd"], 3) == [[BOS, C, D], [BOS, C, D] if bos else [C, D]]


@with_and_without_bos
def test_only_the_answer_and_eos_carry_loss(bos):
    head = [BOS] if bos else []
    assert example_ids(tokenizer(bos), ["cd"], ["abc"]) == [
        {"input_ids": [*head, C, D, AB, C, EOS], "labels": [-100] * len([*head, C, D]) + [AB, C, EOS]}
    ]


@pytest.mark.parametrize("limit, target", [(None, [AB, C, EOS]), (3, [AB, C, EOS]), (2, [AB, C]), (1, [AB])])
def test_an_answer_keeps_its_first_tokens(limit, target):
    (example,) = example_ids(tokenizer(True), ["c"], ["abc"], max_answer=limit)
    assert example["labels"] == [-100, -100, *target]


@with_and_without_bos
def test_tokens_that_merge_across_the_border_leave_the_prompt_as_it_is_tested(bos):
    (example,) = example_ids(tokenizer(bos), ["ca"], ["bd"])  # together: c ab d
    assert example["labels"][-3:] == [B, D, EOS]
    assert example["input_ids"][-5:-3] == [C, A]


@settings(deadline=None)
@given(st.booleans(), st.text("abcd", min_size=1), st.text("abcd", min_size=1), st.integers(1, 6))
def test_the_prompt_of_an_example_is_the_tested_prompt(bos, prompt, answer, limit):
    made = tokenizer(bos)
    for text in (prompt, "<s>" + prompt):
        (example,) = example_ids(made, [text], [answer], limit)
        (tested,) = prompt_ids(made, [text], limit)
        target = example["labels"][len(tested) :]
        assert example["input_ids"] == tested + target
        assert example["labels"][: len(tested)] == [-100] * len(tested)
        assert "".join(made.convert_ids_to_tokens(target)) == answer + "</s>"


# ------------------------------------------------------------------------------------------ sizes, and caches that last


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_a_member_that_is_too_large_is_refused(tmp_path, cache, monkeypatch, name):
    archive = pack(tmp_path / name, [("FOMC/train.json", bytes(10)), ("FOMC/test.json", bytes(60_000))])
    monkeypatch.setattr(data, "MOST_ROWS", 50_000)
    with pytest.raises(DataError, match=r"holds a file of .*nothing was unpacked"):
        data.unpack(archive)
    assert not any(cache.iterdir())
    monkeypatch.setattr(data, "MOST_ROWS", 60_000)
    assert (data.unpack(archive) / "FOMC" / "test.json").stat().st_size == 60_000


def test_what_lies_behind_the_end_of_an_archive_is_not_read_for_ever(tmp_path, cache, monkeypatch):
    import gzip

    whole = pack(tmp_path / "a.tar", [("FOMC/test.json", b"[]")]).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole + bytes(20_000_000)))
    assert data.unpack(tmp_path / "a.tar.gz").is_dir()
    monkeypatch.setattr(data, "MOST_BYTES", 10_000_000)
    shutil.rmtree(cache)
    with pytest.raises(DataError, match="more than"):
        data.unpack(tmp_path / "a.tar.gz")
    assert not any(cache.iterdir())


def test_a_file_of_rows_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    root = layout(tmp_path / "data")
    file = root / "FOMC" / "test.json"
    monkeypatch.setattr(data, "MOST_ROWS", file.stat().st_size)
    assert data.read_split(root, "FOMC", "test") == ROWS
    monkeypatch.setattr(data, "MOST_ROWS", file.stat().st_size - 1)
    with pytest.raises(DataError, match=r"FOMC/test\.json has more than"):
        data.read_split(root, "FOMC", "test")


@pytest.mark.parametrize("source", ["demo", "archive"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(file.read_bytes()[:-5] + b"wrong"),
        Path.unlink,
        lambda file: shutil.rmtree(file.parents[1]),
        lambda file: [shutil.rmtree(file.parents[1]), file.parents[1].mkdir()],
    ],
    ids=["cut", "changed", "gone", "all gone", "empty"],
)
def test_a_damaged_cache_is_made_again(tmp_path, source, damage):
    if source == "archive":
        source = str(pack(tmp_path / "a.zip", [(f"FOMC/{s}.json", json.dumps(ROWS).encode()) for s in data.SPLITS]))
    root = data.find_data(source)
    before = data.data_fingerprint(root, ["trace_fomc"])
    damage(root / "FOMC" / "train.json")
    assert data.find_data(source) == root and data.data_fingerprint(root, ["trace_fomc"]) == before


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES])
def test_a_disk_that_is_full_while_an_archive_is_unpacked_is_no_damage_of_the_archive(
    tmp_path, cache, monkeypatch, kind, number
):
    archive = pack(tmp_path / f"a.{kind}", members(tmp_path))

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        for library in (shutil, tarfile):
            patch.setattr(library, "copyfileobj", full)
        with pytest.raises(SystemExit, match=r"^error: ") as e:
            cli.main(["data", str(archive)])
    assert os.strerror(number) in e.value.code and "Fetch it again" not in e.value.code and "\n" not in e.value.code
    assert "writable" in e.value.code if number == errno.EACCES else "make room" in e.value.code
    assert not list(cache.glob("*")), "nothing half unpacked stays"
    assert data.find_data(str(archive)).is_dir(), "with room it works"
