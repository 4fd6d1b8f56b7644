"""Tests of the judges' client against a fake server with faults: nothing is lost, sent twice or leaked."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from judge_server import KEY, Server, with_key

from judges import JudgeError, batch, bounded, client
from judges.batch import BatchClient
from judges.client import Client
from judges.replies import Cache, Reply, batch_file, read_reply, request_key
from trace_bench.run import RunError


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path, caplog):
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
    def make(model="m", batch=False, **options):
        options = {"cache": tmp_path / "cache.jsonl", "base_url": server.url, **options}
        return (BatchClient if batch else Client)(model, **options)

    return make


def ask(*texts):
    return [{"messages": [{"role": "user", "content": text}]} for text in texts]


def texts(replies):
    return [r.text if r.error is None else r for r in replies]


def echoes(*wanted):
    return [f"echo {w}" for w in wanted]


def shown(error):
    return "".join(traceback.format_exception(error.value)) + repr(error.value)


# ---------------------------------------------------------------------------------------------------- requests, cache


def test_replies_come_in_the_order_of_the_requests_and_each_is_sent_once(server, make):
    judge = make()
    wanted = [f"q{i % 7}" for i in range(20)]
    assert texts(judge.complete(ask(*wanted))) == echoes(*wanted)
    assert len(server.bodies) == 7 and set(server.seen.values()) == {1}
    assert (judge.usage.sent, judge.usage.prompt_tokens, judge.usage.completion_tokens) == (7, 70, 21)
    assert judge.usage.cost(1e6, 2e6) == pytest.approx(70 + 42)
    again = make()
    assert texts(again.complete(ask("q1", "new", "q0"))) == echoes("q1", "new", "q0")
    assert (again.usage.sent, again.usage.cached, again.usage.prompt_tokens) == (1, 2, 10)


def test_whatever_differs_is_another_request(server, make):
    make().complete(ask("a"))
    make("other").complete(ask("a"))
    make(sampling={"temperature": 0.5, "top_k": 3}).complete([{**ask("a")[0], "seed": 4}])
    assert server.bodies[-1] == {"model": "m", **ask("a")[0], "temperature": 0.5, "top_k": 3, "seed": 4}
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    make().complete([{**ask("a")[0], "seed": 1}])
    assert server.seen["a"] == 4
    body = {"model": "m", "messages": []}
    assert request_key("http://x", body) != request_key("http://y", body)
    assert request_key("http://x", body) == request_key("http://x", dict(reversed(body.items())))


def test_no_more_requests_at_a_time_than_allowed(make):
    with Server(delay=0.03) as server:
        make(base_url=server.url, concurrency=3).complete(ask(*map(str, range(12))))
        assert server.most_at_once == 3


def test_torn_lines_of_the_cache_are_skipped_and_not_built_upon(tmp_path):
    path = tmp_path / "cache.jsonl"
    Cache(path).put("one", {"é": 1}, Reply("1"))
    with path.open("ab") as f:
        f.write('{"key": "two", "reply": {"text": "é'.encode()[:-1])  # killed in the middle of a letter
    second = Cache(path)
    assert "one" in second and "two" not in second
    second.put("two", None, Reply("2"))
    with path.open("ab") as f:
        f.write(b'[1]\n{"key": "four"}\n{"key": "five", "reply": {"unknown": 1}}\n\n{"key": "six", "re')
    other = Cache(path)
    second.put("three", None, Reply("x" * 100_000))
    other.read()
    assert [other[k].text for k in ("one", "two", "three")] == ["1", "2", "x" * 100_000]
    assert not any(key in other for key in ("four", "five", "six"))
    assert json.loads(path.read_bytes().split(b"\n")[0])["request"] == {"é": 1}


@pytest.mark.parametrize(
    "changes",
    [
        *({"prompt_tokens": -1}, {"prompt_tokens": True}, {"completion_tokens": 10**400}, {"text": None}),
        *({"text": "\ud800"}, {"thinking": 1}, {"forced": "no"}, {"refusal": 1}, {"finish_reason": []}, {"error": "e"}),
    ],
    ids=repr,
)
def test_a_line_of_a_cache_with_odd_values_counts_as_not_there(tmp_path, changes):
    row = {"key": "k", "request": None, "reply": {**vars(Reply("fine")), **changes}}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "key": ["k"]}) + "\n")
    assert "k" not in Cache(tmp_path / "c.jsonl")


def test_an_estimate_sends_nothing_and_counts_what_is_missing(server, make):
    make(sampling={"max_tokens": 50}).complete(ask("a"))
    guess = make(sampling={"max_tokens": 50}).estimate(ask("a", "b" * 400, "b" * 400, "c" * 40))
    assert (guess.sent, guess.cached, guess.prompt_tokens, guess.completion_tokens) == (2, 1, 110, 100)
    assert len(server.bodies) == 1


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["busy", "down", "cut", "garbled", "html", "number", "deep", "empty", "nothing"])
def test_after_a_fault_the_request_is_sent_again(server, make, fault):
    text = f"FAULT:{fault}*2"
    assert texts(make().complete(ask("fine", text))) == echoes("fine", text)
    assert server.seen[text] == 3 and server.succeeded[text] == 1


@pytest.mark.parametrize("package_waits", [60.0, 0.1])
def test_retry_after_is_waited_for_by_the_package_or_by_us(server, make, monkeypatch, package_waits):
    monkeypatch.setattr(bounded, "PACKAGE_WAIT", package_waits)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_AFTER_DELAY", package_waits, raising=False)
    make(concurrency=1).complete(ask("FAULT:busy*2"))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert all(gap >= 0.15 for gap in gaps) and len(gaps) == 2


def test_a_retry_after_that_is_too_long_ends_the_request(server, make, monkeypatch):
    monkeypatch.setattr(bounded, "PACKAGE_WAIT", 0.1)
    monkeypatch.setattr(bounded, "LONGEST_WAIT", 0.1)
    replies = make().complete(ask("fine", "FAULT:busy*1 b"))
    assert replies[0].error is None and "slow down" in replies[1].error and server.seen["FAULT:busy*1 b"] == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-5", "1e400", "x", "9" * 5000])
def test_an_odd_retry_after_is_no_wait(server, make, monkeypatch, value):
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    server.said["busy"] = (429, {"error": {"message": "slow"}}, {"Retry-After": value})
    started = time.monotonic()
    assert "slow" in make().complete(ask("a", "FAULT:busy"))[1].error and time.monotonic() - started < 10


def test_what_fails_for_good_is_an_error_of_that_request_and_is_asked_again_next_time(server, make, caplog):
    judge, asked = make(), ask("a", "FAULT:garbled*4", "FAULT:long*1", "b")
    replies = judge.complete(asked)
    assert [r.error is None for r in replies] == [True, False, False, True]
    assert "unusable reply" in replies[1].error and "too long for Bearer ***" in replies[2].error
    assert (judge.usage.sent, judge.usage.failed) == (4, 2) and "1 requests failed: Error code: 400" in caplog.text
    assert server.seen["FAULT:garbled*4"] == bounded.ATTEMPTS
    sent = len(server.bodies)
    assert all(r.error is None for r in make().complete(asked)) and len(server.bodies) == sent + 2
    assert set(server.succeeded.values()) == {1}


def test_a_refusal_is_a_reply(server, make):
    for _ in range(2):
        refused, filtered = make().complete(ask("FAULT:refusal", "FAULT:filter"))
        assert (refused.text, refused.refusal, refused.error) == ("I would rather not.", True, None)
        assert (filtered.text, filtered.refusal, filtered.error) == ("", True, None)
    assert set(server.seen.values()) == {1}, "it is kept as any other reply"


def test_a_wrong_key_ends_at_once_and_is_not_shown(server, make):
    with pytest.raises(JudgeError) as e:
        make(concurrency=1).complete(ask("FAULT:denied", "b", "c"))
    assert "Incorrect API key" in str(e.value) and "***" in str(e.value) and KEY not in shown(e)
    assert len(server.bodies) == 1


def test_an_endpoint_that_is_down_ends_after_some_failures_and_keeps_the_rest(server, make, monkeypatch):
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    with pytest.raises(JudgeError, match="in a row"):
        make(concurrency=2).complete(ask("a", "b", *(f"FAULT:down {i}" for i in range(50))))
    assert len(server.bodies) < 20
    assert texts(make().complete(ask("b", "a"))) == echoes("b", "a") and server.seen["a"] == 1


def test_requests_that_the_endpoint_does_not_like_end_the_others_only_from_the_start(server, make):
    long = [f"FAULT:long {i}" for i in range(30)]
    with pytest.raises(JudgeError, match="too long") as e:
        make(concurrency=1).complete(ask(*long))
    assert len(server.bodies) == client.GIVE_UP and KEY not in shown(e)
    with pytest.raises(JudgeError, match="every request"):
        make().complete(ask("FAULT:long"))
    replies = make(concurrency=1).complete(ask("a", *long, "b"))
    assert sum(r.error is not None for r in replies) == 30 and replies[-1].text == "echo b"


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


def test_no_server_at_all_is_an_error_of_the_project(make, monkeypatch):
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    with pytest.raises(JudgeError, match="failed every request"):
        make(base_url="http://127.0.0.1:9/v1").complete(ask("a"))


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


@pytest.mark.parametrize(
    "number", [-3, 10**400, True, 1e400, 2.5, "7", None, [1], {"a": 1}, 10**9 + 1, float("nan")], ids=repr
)
def test_counts_that_cannot_be_true_are_not_believed(server, make, number):
    server.usage = {"prompt_tokens": number, "completion_tokens": 3}
    judge, kept = make(), make()
    judge.complete(ask("a"))
    assert (judge.usage.prompt_tokens, judge.usage.completion_tokens) == (0, 3)
    assert kept.complete(ask("a"))[0].prompt_tokens == 0 and kept.usage.cached == 1


# ------------------------------------------------------------------------------------------------- replies without end


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        *((fault, "more than 4,194,304 bytes") for fault in ("huge", "endless", "huge_error")),
        ("packed", "encoding 'gzip', which was not asked for"),
    ],
)
def test_a_reply_has_a_size_and_is_not_packed(server, make, fault, why):
    replies = make(concurrency=1).complete(ask("a", f"FAULT:{fault}", "b"))
    assert why in replies[1].error and [replies[0].text, replies[2].text] == echoes("a", "b")
    assert server.seen[f"FAULT:{fault}"] == 1, "what is as large again next time is not paid again"
    assert server.written < 40 * 2**20, "the rest is not waited for; there are buffers in between"
    assert server.headers[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize("fault", ["trickle", "drip", "informal", "slow"])
def test_a_reply_has_a_time_in_all(server, make, monkeypatch, fault):
    monkeypatch.setattr(bounded, "ATTEMPTS", 2)
    started = time.monotonic()
    replies = make(timeout=0.4).complete(ask("a", f"FAULT:{fault}", f"FAULT:{fault}*1"))
    assert "no whole reply within 0.4 s" in replies[1].error and [replies[0].text, replies[2].text] == echoes(
        "a", f"FAULT:{fault}*1"
    )
    assert time.monotonic() - started < 10 and server.seen[f"FAULT:{fault}"] == 2


@pytest.mark.parametrize("fault", ["headers", "charset"])
def test_other_replies_that_lead_nowhere_are_errors(make, monkeypatch, fault):
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    started = time.monotonic()
    replies = make().complete(ask("a", f"FAULT:{fault}"))
    assert replies[1].error and replies[0].text == "echo a" and time.monotonic() - started < 20


def test_control_characters_of_a_server_are_shown_as_text(make, caplog):
    error = make().complete(ask("a", "FAULT:control"))[1].error
    assert "\\x1b]0;owned\\x07" in error and "\\u202eevil" in error and error.isprintable()
    assert all(line.isprintable() for line in (r.getMessage() for r in caplog.records if r.name.startswith("judges")))


@pytest.mark.parametrize("way", ["direct", "batch"])
def test_a_redirect_is_not_followed_and_its_address_can_be_used(server, make, monkeypatch, way):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    with Server() as other:
        location = other.url.replace("//", "//user:pw@") + ("/files" if way == "batch" else "/chat/completions")
        server.said["moved"] = (307, "", {"Location": f"{location}?key=secret#f"})
        server.upload_fault = "moved"
        with pytest.raises(JudgeError, match="not followed") as e:
            make(batch=way == "batch").complete(ask("FAULT:moved"))
        assert not other.headers and not other.bodies
        assert "pw" not in str(e.value) and "secret" not in str(e.value)
        (advised,) = re.findall(r"leads to (\S+)", str(e.value))
        judge = make(batch=way == "batch", base_url=advised)
        assert advised == other.url and texts(judge.complete(ask("b"))) == ["echo b"]


@pytest.mark.parametrize(
    ("status", "location"),
    [
        *((301, "/login"), (302, "//other.example/v1"), (303, "javascript:alert(1)"), (308, ""), (304, None)),
        (307, "http://["),
    ],
)
def test_every_redirect_is_one_error(server, make, status, location):
    headers = {} if location is None else {"Location": location}
    server.said["moved"] = (status, "", {"X-Should-Retry": "true", **headers})
    with pytest.raises(JudgeError, match=r"Redirects are not followed.*Name the endpoint itself with --base-url") as e:
        make().complete(ask("FAULT:moved"))
    assert sum(server.seen.values()) == 1 and server.url in str(e.value)


def test_proxies_of_the_environment_stay(server, make, monkeypatch):
    with Server() as proxy:
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        with pytest.raises(JudgeError):  # it is none, and knows no whole addresses
            make().complete(ask("a"))
        assert proxy.headers and not server.headers


# -------------------------------------------------------------------------------------------------------- key, endpoint


def test_a_key_is_in_no_attribute_and_needed_for_openai_alone_and_for_no_estimate(server, make, monkeypatch, tmp_path):
    judge = make()
    assert KEY not in repr(judge) and KEY not in repr(vars(judge)) and KEY not in str(vars(type(judge)))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert texts(judge.complete(ask("a"))) == ["echo a"]
    judge = Client("m", cache=tmp_path / "c.jsonl")
    assert judge.estimate(ask("a")).sent == 1
    with pytest.raises(JudgeError, match="OPENAI_API_KEY is not set"):
        judge.complete(ask("a"))
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    judge = Client("m", cache=tmp_path / "c.jsonl")
    assert judge.endpoint == server.url and texts(judge.complete(ask("a"))) == ["echo a"]


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}", "localhost:8000", "ftp://x"]
)
def test_a_url_that_holds_a_key_or_is_none_is_an_error(url, make):
    with pytest.raises(JudgeError) as e:
        make(base_url=url)
    assert KEY not in shown(e)


@pytest.mark.parametrize("key", ["sk-ü", "sk-a\nb"])
def test_a_key_that_fits_into_no_header_is_not_shown(key, make, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(JudgeError) as e:
        make()
    assert key not in shown(e) and repr(key)[1:-1] not in shown(e)


# --------------------------------------------------------------------------------------------------------------- kills


def program(url, cache, n, kind="Client", **options):
    """A program that asks n things, in another process."""
    code = (
        "from pathlib import Path\nfrom judges import batch\n"
        f"batch.POLL_SECONDS = 0.05\n"
        f"judge = batch.{kind}('m', cache=Path({str(cache)!r}), base_url={url!r}, **{options!r})\n"
        f"judge.complete([{{'messages': [{{'role': 'user', 'content': f'q{{i}}'}}]}} for i in range({n})])\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_program_loses_only_what_was_in_flight(tmp_path, make):
    cache, n, concurrency = tmp_path / "cache.jsonl", 40, 4
    with Server(delay=0.05) as server:
        process = program(server.url, cache, n, concurrency=concurrency)
        wait_for(lambda: cache.exists() and cache.read_bytes().count(b"\n") >= 10)
        kill(process)
        kept = cache.read_bytes().count(b"\n")
        judge = make(base_url=server.url, concurrency=concurrency)
        wanted = [f"q{i}" for i in range(n)]
        assert 10 <= kept < n and texts(judge.complete(ask(*wanted))) == echoes(*wanted)
        assert judge.usage.cached >= kept and judge.usage.cached + judge.usage.sent == n
        # Only what was on its way when the program was killed was answered twice.
        assert sum(server.seen.values()) <= n + concurrency


def test_a_killed_program_does_not_submit_twice(server, tmp_path, make):
    server.batch_polls = 10**6
    process = program(server.url, tmp_path / "cache.jsonl", 5, "BatchClient")
    wait_for(lambda: any(b["polls"] for b in server.batches.values()))
    kill(process)
    server.batch_polls = 0
    with pytest.raises(JudgeError, match="5 of these requests are in a batch"):
        make().complete(ask(*(f"q{i}" for i in range(6))))
    wanted = [f"q{i}" for i in range(6)]
    assert texts(make(batch=True).complete(ask(*wanted))) == echoes(*wanted)
    assert [len(rows) for rows in server.files.values()] == [5, 1]
    assert set(server.succeeded.values()) == {1}


@pytest.mark.parametrize(("kind", "numbers"), [("Client", (20, 30)), ("BatchClient", (5, 8))])
def test_two_programs_at_once_pay_once(tmp_path, kind, numbers):
    cache = tmp_path / "cache.jsonl"
    with Server(delay=0.05) as server:
        server.batch_polls = 3
        for process in [program(server.url, cache, n, kind) for n in numbers]:
            assert process.wait(timeout=120) == 0
        assert set(server.succeeded.values()) == {1} and len(server.succeeded) == max(numbers)
        assert sum(len(rows) for rows in server.files.values()) == (max(numbers) if server.files else 0)
        assert len(cache.read_text().splitlines()) == max(numbers) and not batch_file(cache).exists()


def test_a_killed_program_keeps_nobody_waiting(tmp_path, caplog, make):
    cache = tmp_path / "cache.jsonl"
    with Server(delay=0.2) as server:
        first = program(server.url, cache, 500, concurrency=2)
        wait_for(lambda: cache.exists() and cache.read_bytes().count(b"\n") >= 4)
        done, judge = [], make(base_url=server.url)
        waiting = threading.Thread(target=lambda: done.extend(judge.complete(ask("q0", "q1", "mine"))))
        waiting.start()
        wait_for(lambda: "Waiting for process" in caplog.text)
        assert f"process {first.pid} on " in caplog.text and not server.seen["mine"]
        kill(first)
        waiting.join(timeout=60)
        assert texts(done) == echoes("q0", "q1", "mine") and server.seen["q0"] == 1 == server.seen["mine"]


def test_a_stopped_program_gives_the_cache_back(make, monkeypatch):
    judge = make()
    monkeypatch.setattr(judge, "_send", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        judge.complete(ask("a"))
    assert texts(make().complete(ask("a"))) == ["echo a"]


def test_without_locks_a_warning_is_all(make, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert texts(make().complete(ask("a"))) == ["echo a"] and "no locks on this file system" in caplog.text


# ----------------------------------------------------------------------------------------------------------- Batch API


def test_the_batch_api_gives_the_same_replies_into_the_same_cache(server, make):
    make().complete(ask("a"))
    server.batch_polls = 3
    judge = make(batch=True)
    assert texts(judge.complete(ask("a", "b", "c", "b"))) == echoes("a", "b", "c", "b")
    assert len(server.batches) == 1 and len(server.files["file-0"]) == 2 and server.seen == {"a": 1}
    assert server.files["file-0"][0]["url"] == "/v1/chat/completions"
    assert (judge.usage.sent, judge.usage.prompt_tokens) == (2, 20)
    assert not batch_file(judge.cache.path).exists()
    assert texts(make().complete(ask("c", "b"))) == echoes("c", "b") and server.seen == {"a": 1}


def test_a_large_batch_is_split(server, make, monkeypatch):
    monkeypatch.setattr(batch, "MOST_REQUESTS", 3)
    wanted = [f"q{i}" for i in range(8)]
    assert texts(make(batch=True).complete(ask(*wanted))) == echoes(*wanted)
    assert sorted(len(rows) for rows in server.files.values()) == [2, 3, 3]
    monkeypatch.setattr(batch, "MOST_BYTES", 300)
    make(batch=True).complete(ask("x" * 100, "y" * 100))
    assert len(server.batches) == 5


def test_requests_that_failed_in_a_batch_are_in_the_next_one(server, make):
    replies = make(batch=True).complete(ask("a", "FAULT:down"))
    assert replies[0].text == "echo a" and "500" in replies[1].error
    make(batch=True).complete(ask("a", "b", "FAULT:down"))
    assert [row["body"]["messages"][0]["content"] for row in server.files["file-1"]] == ["b", "FAULT:down"]


def remember(make, *batches):
    file = batch_file(make().cache.path)
    file.write_text(json.dumps({"batches": batches}))
    return file


def test_a_batch_that_was_made_before_its_name_was_known_is_found(server, make):
    """Killed, or cut off, between the making of a batch and the answer."""
    server.batch_fault = "lose"
    assert texts(make(batch=True).complete(ask("a"))) == ["echo a"]
    assert len(server.batches) == 1
    server.batch_fault = ""
    bodies = make().bodies(ask("b"))
    server.files["file-1"] = [{"custom_id": key, "body": body} for key, body in bodies.items()]
    server.batches["batch-1"] = {
        "input_file_id": "file-1", "endpoint": "/v1/chat/completions", "metadata": {"trace_bench": "tag"}, "polls": 0,
    }  # fmt: skip
    entry = {"tag": "tag", "id": None, "endpoint": server.url, "keys": list(bodies)}
    never = {**entry, "tag": "never made", "keys": list(make().bodies(ask("c")))}
    elsewhere = {**never, "endpoint": "http://elsewhere/v1"}
    file = remember(make, entry, never, elsewhere)
    assert texts(make(batch=True).complete(ask("b", "c"))) == echoes("b", "c")
    assert len(server.batches) == 3 and set(server.succeeded.values()) == {1}
    assert json.loads(file.read_text()) == {"batches": [elsewhere]}


def test_what_is_in_a_batch_is_not_sent_one_by_one_as_well(server, make):
    file = remember(make, {"tag": "t", "id": "batch-9", "endpoint": server.url, "keys": list(make().bodies(ask("a")))})
    with pytest.raises(JudgeError, match="Use --batch to wait for it, or delete") as e:
        make().complete(ask("a", "b"))
    assert not server.seen and str(file) in str(e.value)
    assert texts(make().complete(ask("c"))) == ["echo c"]
    file.unlink()
    assert texts(make().complete(ask("a", "b"))) == echoes("a", "b")


@pytest.mark.parametrize("fault, message", [("refuse", "no, Bearer \\*\\*\\*"), ("fail", "bad file")])
def test_a_batch_that_is_refused_or_fails_is_an_error_and_leaves_nothing_behind(server, make, fault, message):
    server.batch_fault = fault
    judge = make(batch=True)
    with pytest.raises(JudgeError, match=message) as e:
        judge.complete(ask("a"))
    assert KEY not in shown(e) and not batch_file(judge.cache.path).exists()
    server.batch_fault = ""
    assert texts(make(batch=True).complete(ask("a"))) == ["echo a"]
    with pytest.raises(JudgeError, match="Without --batch"):
        make(batch=True, base_url=server.url + "/nothing").complete(ask("b"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 7), ("id", "../../v2"), ("id", "a\nb"), ("id", None), ("status", "resting"), ("status", {"a": 1}),
        ("status", None), ("status", "\x1b[2J"), ("output_file_id", "a/../b?c"), ("output_file_id", 5),
    ],
)  # fmt: skip
def test_what_a_batch_api_may_not_say_is_one_error(server, make, field, value):
    said = server.batch
    server.batch = lambda name: {**said(name), field: value}
    with pytest.raises(JudgeError, match=r"unusable reply|did not make the batch") as e:
        make(batch=True).complete(ask("a"))
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    "counts", [None, 5, [], {"completed": 10**400, "failed": "x"}, {"completed": -9, "failed": True}]
)
def test_odd_counts_and_reasons_of_a_batch_are_survived(server, make, counts):
    said = server.batch
    odd = {"request_counts": counts, "errors": {"data": "none"}, "metadata": [1], "created_at": "never"}
    server.batch = lambda name: {**said(name), **odd}
    assert texts(make(batch=True).complete(ask("a"))) == ["echo a"]


@pytest.mark.parametrize("rows", [5, [5], [{"id": 1}], [{"id": "x", "metadata": "tag"}]])
def test_a_list_of_batches_without_end_has_one(server, make, monkeypatch, rows):
    monkeypatch.setattr(batch, "MOST_PAGES", 3)
    server.batch_fault = "lose"
    asked, get = [], server.get

    def listed(handler, path):
        if path == ["batches"]:
            asked.append(path)
            server.send(handler, 200, {"data": rows, "has_more": True})
        else:
            get(handler, path)

    server.get = listed
    with pytest.raises(JudgeError):
        make(batch=True).complete(ask("a"))
    assert 1 <= len(asked) <= 3


def test_the_file_of_a_batch_has_a_size_and_no_replies_to_what_was_not_asked(server, make, monkeypatch):
    monkeypatch.setattr(batch, "MOST_REPLY", 10_000)
    key, output = next(iter(make().bodies(ask("b")))), server.output
    forged = {"custom_id": key, "response": {"status_code": 200, "body": server.completion("forged")}}
    junk = f'\n{json.dumps(forged)}\n{{"custom_id": []}}\n{"x" * 5000}'
    server.output = lambda name, errors: output(name, errors) + junk
    judge = make(batch=True)
    assert texts(judge.complete(ask("a"))) == ["echo a"] and key not in judge.cache
    server.output = lambda name, errors: "x" * 50_000
    with pytest.raises(JudgeError, match="more than 20,000 bytes"):
        make(batch=True).complete(ask("b"))


@pytest.mark.parametrize("content", ["[]", '{"batches": 5}', '{"batches": [5]}', '{"batches": [{"keys": [1]}]}', "{"])
def test_a_damaged_list_of_batches_is_named(make, content):
    file = batch_file(make().cache.path)
    file.write_text(content)
    with pytest.raises(RunError, match=f"{file.name} is damaged.*Delete it"):
        make(batch=True).complete(ask("a"))
    file.unlink()
    assert texts(make(batch=True).complete(ask("a"))) == ["echo a"]
