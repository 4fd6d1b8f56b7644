"""Tests of the judges' client against a fake server with faults: nothing is lost, sent twice or leaked."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from judge_server import KEY, Server, with_key

from judges import JudgeError, batch, client
from judges.batch import batch_file
from judges.client import Cache, Client, Reply, read_reply, request_key


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.02)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    caplog.set_level(logging.DEBUG)
    with with_key(monkeypatch, tmp_path):
        yield
    assert KEY not in "\n".join(map(logging.Formatter().format, caplog.get_records("call")))


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def make(server, tmp_path):
    def make(model="m", **options):
        return Client(model, cache=tmp_path / "cache.jsonl", base_url=server.url, **options)

    return make


def ask(*texts):
    return [{"messages": [{"role": "user", "content": text}]} for text in texts]


def texts(replies):
    return [r.text if r.error is None else r for r in replies]


def shown(error):
    return "".join(traceback.format_exception(error.value)) + repr(error.value)


# ---------------------------------------------------------------------------------------------------- requests, cache


def test_replies_come_in_the_order_of_the_requests_and_each_is_sent_once(server, make):
    judge = make()
    wanted = [f"q{i % 7}" for i in range(20)]
    assert texts(judge.complete(ask(*wanted))) == [f"echo {w}" for w in wanted]
    assert len(server.bodies) == 7 and set(server.seen.values()) == {1}
    assert (judge.usage.sent, judge.usage.prompt_tokens, judge.usage.completion_tokens) == (7, 70, 21)
    assert judge.usage.cost(1e6, 2e6) == pytest.approx(70 + 42)


def test_a_second_program_sends_only_what_is_new(server, make):
    make().complete(ask("a", "b"))
    again = make()
    assert texts(again.complete(ask("b", "c", "a"))) == ["echo b", "echo c", "echo a"]
    assert dict(server.seen) == {"a": 1, "b": 1, "c": 1}
    assert (again.usage.sent, again.usage.cached, again.usage.prompt_tokens) == (1, 2, 10)


def test_a_request_holds_the_model_and_every_sampling_parameter(server, make):
    make(sampling={"temperature": 0.5, "top_k": 3}).complete([{**ask("a")[0], "seed": 4}])
    body = server.bodies[0]
    assert body == {"model": "m", "messages": ask("a")[0]["messages"], "temperature": 0.5, "top_k": 3, "seed": 4}
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_whatever_differs_is_another_request(server, make):
    make().complete(ask("a"))
    make("other").complete(ask("a"))
    make(sampling={"temperature": 1}).complete(ask("a"))
    make().complete([{**ask("a")[0], "seed": 1}])
    assert server.seen["a"] == 4
    body = {"model": "m", "messages": []}
    assert request_key("http://x", body) != request_key("http://y", body)
    assert request_key("http://x", body) == request_key("http://x", dict(reversed(body.items())))


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    with Server(delay=0.03) as server:
        judge = Client("m", cache=tmp_path / "c.jsonl", base_url=server.url, concurrency=3)
        judge.complete(ask(*map(str, range(15))))
        assert server.most_at_once == 3


def test_torn_lines_of_the_cache_are_skipped_and_not_built_upon(tmp_path):
    path = tmp_path / "cache.jsonl"
    Cache(path).put("one", {"é": 1}, Reply("1"))
    with path.open("ab") as f:
        f.write('{"key": "two", "reply": {"text": "é'.encode()[:-1])  # killed in the middle of a letter
    second = Cache(path)
    assert "one" in second and "two" not in second
    second.put("two", None, Reply("2"))
    second.put("three", None, Reply("3"))
    with path.open("a") as f:
        f.write('[1]\n{"key": "four"}\n{"key": "five", "reply": {"unknown": 1}}\n\n')
    third = Cache(path)
    assert [third[k].text for k in ("one", "two", "three")] == ["1", "2", "3"]
    assert "four" not in third and "five" not in third
    assert json.loads(path.read_bytes().split(b"\n")[0])["request"] == {"é": 1}


def test_an_estimate_sends_nothing_and_counts_what_is_missing(server, make):
    judge = make(sampling={"max_tokens": 50})
    judge.complete(ask("a"))
    guess = make(sampling={"max_tokens": 50}).estimate(ask("a", "b" * 400, "b" * 400, "c" * 40))
    assert (guess.sent, guess.cached, guess.prompt_tokens, guess.completion_tokens) == (2, 1, 110, 100)
    assert len(server.bodies) == 1


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["busy", "down", "cut", "garbled", "html", "number", "empty", "nothing"])
def test_after_a_fault_the_request_is_sent_again(server, make, fault):
    text = f"FAULT:{fault}*2"
    assert texts(make().complete(ask("fine", text))) == ["echo fine", f"echo {text}"]
    assert server.seen[text] == 3 and server.succeeded[text] == 1


def test_a_time_out_is_followed_by_another_try(server, make):
    text = "FAULT:slow*1"
    assert texts(make(timeout=0.3).complete(ask(text))) == [f"echo {text}"]
    assert server.seen[text] == 2


def test_retry_after_is_waited_for(server, make):
    make(concurrency=1).complete(ask("FAULT:busy*2"))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert all(gap >= 0.15 for gap in gaps) and len(gaps) == 2


def test_a_longer_retry_after_than_the_package_takes_is_waited_for_too(server, make, monkeypatch):
    if not hasattr(openai._base_client, "MAX_RETRY_AFTER_DELAY"):
        pytest.skip(f"openai {openai.__version__} has its longest wait, a minute, where no test can shorten it")
    monkeypatch.setattr("openai._base_client.MAX_RETRY_AFTER_DELAY", 0.1)
    make().complete(ask("FAULT:busy*2"))
    assert all(b - a >= 0.15 for a, b in zip(server.times, server.times[1:], strict=False))
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.1)
    replies = make().complete(ask("fine", "FAULT:busy*1 b"))
    assert replies[0].error is None and "slow down" in replies[1].error


def test_what_fails_for_good_is_an_error_of_that_request_and_is_asked_again_next_time(server, make, monkeypatch):
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    judge = make()
    replies = judge.complete(ask("a", "FAULT:garbled*4", "FAULT:long*1", "b"))
    assert [r.error is None for r in replies] == [True, False, False, True]
    assert "unusable reply" in replies[1].error and "too long for Bearer ***" in replies[2].error
    assert (judge.usage.sent, judge.usage.failed) == (4, 2)
    sent = len(server.bodies)
    again = make().complete(ask("a", "FAULT:garbled*4", "FAULT:long*1", "b"))
    assert all(r.error is None for r in again) and len(server.bodies) == sent + 2
    assert set(server.succeeded.values()) == {1}


def test_a_refusal_is_a_reply(server, make):
    replies = make().complete(ask("FAULT:refusal", "FAULT:filter"))
    assert [(r.text, r.refusal, r.error) for r in replies] == [("I would rather not.", True, None), ("", True, None)]
    make().complete(ask("FAULT:refusal", "FAULT:filter"))
    assert set(server.seen.values()) == {1}, "it is kept as any other reply"


def test_a_wrong_key_ends_at_once_and_is_not_shown(server, make):
    with pytest.raises(JudgeError) as e:
        make(concurrency=1).complete(ask("FAULT:denied", "b", "c"))
    assert "Incorrect API key" in str(e.value) and "***" in str(e.value) and KEY not in shown(e)
    assert len(server.bodies) == 1


def test_an_endpoint_that_is_down_ends_after_some_failures_and_keeps_the_rest(server, make, monkeypatch):
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    bad = [f"FAULT:down {i}" for i in range(50)]
    with pytest.raises(JudgeError, match="in a row"):
        make(concurrency=2).complete(ask("a", "b", *bad))
    assert len(server.bodies) < 20
    assert texts(make().complete(ask("b", "a"))) == ["echo b", "echo a"] and server.seen["a"] == 1


def test_requests_that_the_endpoint_does_not_like_do_not_end_the_others(server, make):
    long = [f"FAULT:long {i}" for i in range(30)]
    replies = make(concurrency=1).complete(ask("a", *long, "b"))
    assert sum(r.error is not None for r in replies) == 30 and replies[-1].text == "echo b"


def test_a_request_that_is_wrong_from_the_start_ends(server, make):
    with pytest.raises(JudgeError, match="too long") as e:
        make(concurrency=1).complete(ask(*(f"FAULT:long {i}" for i in range(30))))
    assert len(server.bodies) == client.GIVE_UP and KEY not in shown(e)
    with pytest.raises(JudgeError, match="every request"):
        make().complete(ask("FAULT:long"))


@pytest.mark.parametrize("way", ["direct", "batch"])
def test_a_later_call_may_fail_throughout(server, make, way):
    """The few last requests of a program may be those that are too long."""
    judge = make(batch=way == "batch", concurrency=1)
    judge.complete(ask("a"))
    assert all(r.error for r in judge.complete(ask(*(f"FAULT:long {i}" for i in range(12)))))
    assert judge.usage.failed == 12
    again = make(batch=way == "batch")
    again.complete(ask("a"))
    assert again.complete(ask("FAULT:long"))[0].error, "what the cache held counts too"


def test_no_server_at_all_is_an_error_of_the_project(make, server, monkeypatch):
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    judge = make()
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(JudgeError) as e:
        judge.complete(ask("a"))
    assert server.url in str(e.value)


@pytest.mark.parametrize(
    "body",
    [None, [], "text", {}, {"choices": {}}, {"choices": [1]}, {"choices": [{}]}, {"choices": [{"message": "x"}]},
     {"choices": [{"message": {"content": [1]}}]}],
)  # fmt: skip
def test_a_body_without_a_reply_is_told_from_an_empty_reply(body):
    with pytest.raises(ValueError):
        read_reply(body)
    assert read_reply({"choices": [{"message": {"content": None}}]}) == Reply("")
    assert read_reply({"choices": [{"message": {"content": "half \ud83d"}}]}) == Reply("half ?")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_that_a_server_tells_apart_is_no_answer(name):
    def read(**message):
        return read_reply({"choices": [{"message": message, "finish_reason": "length"}]})

    thought = Reply("", thinking="It is [[A]]", unclosed=True, finish_reason="length")
    assert read(content=None, **{name: "It is [[A]]"}) == thought == read(**{name: "It is [[A]]"}, content="")
    assert read(content="[[B]]", **{name: "It is [[A]]"}) == replace(thought, text="[[B]]", unclosed=False)
    assert read(content="[[B]]", **{name: None}).thinking == "" == read(content="[[B]]", **{name: [1]}).thinking
    assert not read(content=None, refusal="No.", **{name: "x"}).unclosed


@pytest.mark.parametrize("reason", ["length", "max_tokens", "model_length"])
def test_a_reply_that_ended_at_its_limit_is_cut_under_any_name(reason):
    assert Reply("", finish_reason=reason).cut and not Reply("", finish_reason="stop").cut and not Reply("").cut


# -------------------------------------------------------------------------------------------------------- key, endpoint


def test_the_key_is_in_no_attribute(make):
    judge = make()
    assert KEY not in repr(judge) and KEY not in repr(vars(judge)) and KEY not in str(vars(type(judge)))


def test_a_key_is_needed_for_openai_alone_and_for_no_estimate(server, make, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert texts(make().complete(ask("a"))) == ["echo a"]
    judge = Client("m", cache=tmp_path / "c.jsonl")
    assert judge.estimate(ask("a")).sent == 1
    with pytest.raises(JudgeError, match="OPENAI_API_KEY is not set"):
        judge.complete(ask("a"))


def test_the_endpoint_comes_from_the_environment(server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    judge = Client("m", cache=tmp_path / "c.jsonl")
    assert judge.endpoint == server.url and texts(judge.complete(ask("a"))) == ["echo a"]


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}", "localhost:8000", "ftp://x"]
)
def test_a_url_that_holds_a_key_or_is_none_is_an_error(url, tmp_path):
    with pytest.raises(JudgeError) as e:
        Client("m", cache=tmp_path / "c.jsonl", base_url=url)
    assert KEY not in shown(e)


@pytest.mark.parametrize("key", ["sk-ü", "sk-a\nb"])
def test_a_key_that_fits_into_no_header_is_not_shown(key, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(JudgeError) as e:
        Client("m", cache=tmp_path / "c.jsonl")
    assert key not in shown(e) and repr(key)[1:-1] not in shown(e)


# --------------------------------------------------------------------------------------------------------------- kills


def program(url, cache, n, **options):
    """A program that asks n things, in another process."""
    code = (
        "from pathlib import Path\nfrom judges import batch\nfrom judges.client import Client\n"
        f"batch.POLL_SECONDS = 0.05\n"
        f"judge = Client('m', cache=Path({str(cache)!r}), base_url={url!r}, **{options!r})\n"
        f"judge.complete([{{'messages': [{{'role': 'user', 'content': f'q{{i}}'}}]}} for i in range({n})])\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_killed_program_loses_only_what_was_in_flight(tmp_path):
    cache, n, concurrency = tmp_path / "cache.jsonl", 60, 4
    with Server(delay=0.05) as server:
        for goal in (10, 30):
            process = program(server.url, cache, n, concurrency=concurrency)
            wait_for(lambda goal=goal: cache.exists() and cache.read_bytes().count(b"\n") >= goal)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        kept = cache.read_bytes().count(b"\n")
        assert 30 <= kept < n
        judge = Client("m", cache=cache, base_url=server.url, concurrency=concurrency)
        replies = judge.complete(ask(*(f"q{i}" for i in range(n))))
        assert texts(replies) == [f"echo q{i}" for i in range(n)]
        assert judge.usage.cached >= kept and judge.usage.cached + judge.usage.sent == n
        # Only what was on its way when the program was killed was answered twice.
        assert sum(server.seen.values()) <= n + 2 * concurrency


# ----------------------------------------------------------------------------------------------------------- Batch API


def test_the_batch_api_gives_the_same_replies_into_the_same_cache(server, make):
    make().complete(ask("a"))
    server.batch_polls = 3
    judge = make(batch=True)
    assert texts(judge.complete(ask("a", "b", "c", "b"))) == ["echo a", "echo b", "echo c", "echo b"]
    assert len(server.batches) == 1 and len(server.files["file-0"]) == 2 and server.seen == {"a": 1}
    assert server.files["file-0"][0]["url"] == "/v1/chat/completions"
    assert (judge.usage.sent, judge.usage.prompt_tokens) == (2, 20)
    assert not batch_file(judge.cache.path).exists()
    assert texts(make().complete(ask("c", "b"))) == ["echo c", "echo b"] and server.seen == {"a": 1}


def test_a_large_batch_is_split(server, make, monkeypatch):
    monkeypatch.setattr(batch, "MOST_REQUESTS", 3)
    wanted = [f"q{i}" for i in range(8)]
    assert texts(make(batch=True).complete(ask(*wanted))) == [f"echo {w}" for w in wanted]
    assert sorted(len(rows) for rows in server.files.values()) == [2, 3, 3]
    monkeypatch.setattr(batch, "MOST_BYTES", 300)
    make(batch=True).complete(ask("x" * 100, "y" * 100))
    assert len(server.batches) == 5


def test_requests_that_failed_in_a_batch_are_in_the_next_one(server, make):
    replies = make(batch=True).complete(ask("a", "FAULT:down"))
    assert replies[0].text == "echo a" and "500" in replies[1].error
    make(batch=True).complete(ask("a", "b", "FAULT:down"))
    assert [row["body"]["messages"][0]["content"] for row in server.files["file-1"]] == ["b", "FAULT:down"]


def test_a_killed_program_does_not_submit_twice(server, tmp_path):
    server.batch_polls = 10**6
    cache = tmp_path / "cache.jsonl"
    process = program(server.url, cache, 5, batch=True)
    wait_for(lambda: any(b["polls"] for b in server.batches.values()))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    server.batch_polls = 0
    judge = Client("m", cache=cache, base_url=server.url, batch=True)
    assert texts(judge.complete(ask(*(f"q{i}" for i in range(6))))) == [f"echo q{i}" for i in range(6)]
    assert [len(rows) for rows in server.files.values()] == [5, 1]
    assert set(server.succeeded.values()) == {1}


def test_a_batch_that_was_made_before_its_name_was_known_is_found(server, make, tmp_path):
    """Killed, or cut off, between the making of a batch and the answer."""
    server.batch_fault = "lose"
    assert texts(make(batch=True).complete(ask("a"))) == ["echo a"]
    assert len(server.batches) == 1
    server.batch_fault = ""
    server.files["file-1"] = [{"custom_id": key, "body": body} for key, body in make().bodies(ask("b")).items()]
    server.batches["batch-1"] = {
        "input_file_id": "file-1", "endpoint": "/v1/chat/completions", "metadata": {"trace_bench": "tag"}, "polls": 0,
    }  # fmt: skip
    entry = {"tag": "tag", "id": None, "endpoint": server.url, "keys": list(make().bodies(ask("b")))}
    never = {**entry, "tag": "never made", "keys": list(make().bodies(ask("c")))}
    batch_file(tmp_path / "cache.jsonl").write_text(json.dumps({"batches": [entry, never]}))
    assert texts(make(batch=True).complete(ask("b", "c"))) == ["echo b", "echo c"]
    assert len(server.batches) == 3 and set(server.succeeded.values()) == {1}


@pytest.mark.parametrize("fault, message", [("refuse", "no, Bearer \\*\\*\\*"), ("fail", "bad file")])
def test_a_batch_that_is_refused_or_fails_is_an_error_and_leaves_nothing_behind(server, make, fault, message):
    server.batch_fault = fault
    judge = make(batch=True)
    with pytest.raises(JudgeError, match=message) as e:
        judge.complete(ask("a"))
    assert KEY not in shown(e) and not batch_file(judge.cache.path).exists()
    server.batch_fault = ""
    assert texts(make(batch=True).complete(ask("a"))) == ["echo a"]


def test_an_endpoint_without_the_batch_api_says_so(tmp_path, server, monkeypatch):
    judge = Client("m", cache=tmp_path / "c.jsonl", base_url=server.url + "/nothing", batch=True)
    with pytest.raises(JudgeError, match="Without --batch"):
        judge.complete(ask("a"))
