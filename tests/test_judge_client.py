"""Tests of the judges' client with a fake server that has faults: nothing is lost, sent twice or leaked."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from judge_server import KEY, Server, with_key

from judges import JudgeError, batch, bounded, client
from judges.batch import BatchClient
from judges.client import Client
from judges.replies import Cache, Reply, batch_file, read_reply, request_key
from trace_bench.run import RunError


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path, caplog):
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
    judge, server.delay = make(concurrency=3), 0.03
    wanted = [f"q{i % 7}" for i in range(20)]
    assert texts(judge.complete(ask(*wanted))) == echoes(*wanted) and server.most_at_once == 3
    assert len(server.bodies) == 7 and set(server.seen.values()) == {1}
    assert (judge.usage.sent, judge.usage.prompt_tokens, judge.usage.completion_tokens) == (7, 70, 21)
    again = make()
    assert texts(again.complete(ask("q1", "new", "q0"))) == echoes("q1", "new", "q0")
    assert (again.usage.sent, again.usage.cached, again.usage.prompt_tokens) == (1, 2, 10)
    guess = make(sampling={"max_tokens": 50}).estimate(ask("b" * 400, "b" * 400, "c" * 40))
    assert (guess.sent, guess.cached, guess.prompt_tokens, guess.completion_tokens) == (2, 0, 110, 100)
    assert make().estimate(ask("q1")).cached == 1 and len(server.bodies) == 8


def test_any_difference_makes_a_new_request(server, make):
    asked = {**ask("a")[0], "seed": 4}
    for judge in (make(), make("other"), make(sampling={"temperature": 0.5, "top_k": 3})):
        judge.complete([asked, ask("a")[0]])
    without = make(sampling={"seed": None})  # for an endpoint that takes no seed
    without.complete([asked, {**asked, "seed": 5}])
    assert server.bodies[-2:] == [{"model": "m", **ask("a")[0]}] * 2
    server.seen["a"] -= 2
    assert server.seen["a"] == 6 and server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert {"model": "m", **asked, "temperature": 0.5, "top_k": 3} in server.bodies
    assert request_key("http://x", asked) != request_key("http://y", asked)
    assert request_key("http://x", asked) == request_key("http://x", dict(reversed(asked.items())))


def test_torn_and_odd_lines_of_the_cache_are_skipped_and_not_appended_to(tmp_path):
    path = tmp_path / "cache.jsonl"
    Cache(path).put("one", {"é": 1}, Reply("1"))
    with path.open("ab") as f:
        f.write('{"key": "two", "reply": {"text": "é'.encode()[:-1])  # killed within a character
    second = Cache(path)
    assert "one" in second and "two" not in second
    second.put("two", None, Reply("2"))
    odd = [
        *({"prompt_tokens": -1}, {"prompt_tokens": True}, {"completion_tokens": 10**400}, {"text": None}),
        *({"text": "\ud800"}, {"thinking": 1}, {"forced": "no"}, {"refusal": 1}, {"finish_reason": []}, {"error": "e"}),
    ]
    rows = [*({"key": "odd", "reply": {**vars(Reply("fine")), **o}} for o in odd), [1], {"key": "odd"}]
    with path.open("a") as f:
        f.write("\n".join(map(json.dumps, rows)) + '\n\n{"key": "odd", "re')
    other = Cache(path)
    second.put("three", None, Reply("x" * 100_000))
    other.read()
    assert other == {"one": Reply("1"), "two": Reply("2"), "three": Reply("x" * 100_000)}
    assert json.loads(path.read_bytes().split(b"\n")[0])["request"] == {"é": 1}


# -------------------------------------------------------------------------------------------------------------- faults


def test_after_a_fault_the_request_is_sent_again(server, make):
    faults = ("busy", "down", "cut", "garbled", "html", "number", "deep", "empty", "nothing")
    asked = ["fine", *(f"FAULT:{fault}*2" for fault in faults)]
    assert texts(make().complete(ask(*asked))) == echoes(*asked)
    assert dict(server.seen) == {text: 1 + 2 * (text != "fine") for text in asked}
    assert set(server.succeeded.values()) == {1}
    assert texts(make(base_url=server.url.removesuffix("/v1")).complete(ask("FAULT:html*1"))) == echoes("FAULT:html*1")


@pytest.mark.parametrize("package_waits", [60.0, 0.1])
def test_retry_after_is_respected_unless_it_is_too_long(server, make, monkeypatch, package_waits):
    monkeypatch.setattr(bounded, "PACKAGE_WAIT", package_waits)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_AFTER_DELAY", package_waits, raising=False)
    make(concurrency=1).complete(ask("FAULT:busy*2"))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert all(gap >= 0.15 for gap in gaps) and len(gaps) == 2
    server.said["fine"] = (200, server.completion("fine"), {"Retry-After": "3"})
    started = time.monotonic()
    assert texts(make().complete(ask("FAULT:fine"))) == echoes("fine") and time.monotonic() - started < 2.5
    monkeypatch.setattr(bounded, "PACKAGE_WAIT", 0.1)
    monkeypatch.setattr(bounded, "LONGEST_WAIT", 0.1)
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=300))
    assert 295 < bounded._seconds(later) <= 300
    tries = {"0.15": 1, "nan": 2, "-5": 2, "x": 2, "9" * 5000: 1}
    for i, value in enumerate(tries):
        server.said[f"odd{i}"] = (429, {"error": {"message": "slow"}}, {"Retry-After": value})
    asked = [f"FAULT:odd{i}*1" for i in range(len(tries))]
    fine, *replies = make().complete(ask("fine", *asked))
    assert fine.error is None and [server.seen[text] for text in asked] == list(tries.values())
    assert [bool(r.error) for r in replies] == [n == 1 for n in tries.values()]


def test_permanent_failures_are_errors_and_sent_again_next_time_but_refusals_are_replies(server, make, caplog):
    judge = make()
    asked = ask("a", "FAULT:refusal", "FAULT:filter", "FAULT:garbled*4", "FAULT:long*1", "FAULT:flagged")
    fine, refused, filtered, garbled, long, flagged = judge.complete(asked)
    assert flagged == filtered
    assert (fine.text, refused.text, refused.refusal) == ("echo a", "I would rather not.", True)
    assert (filtered.text, filtered.refusal, filtered.error) == ("", True, None)
    assert "unusable reply" in garbled.error and "too long for Bearer ***" in long.error
    assert (judge.usage.sent, judge.usage.failed, judge.usage.uncounted) == (6, 2, 0)
    assert "1 requests failed: Error code: 400" in caplog.text
    assert server.seen["FAULT:garbled*4"] == bounded.ATTEMPTS
    sent = len(server.bodies)
    assert all(r.error is None for r in make().complete(asked)) and len(server.bodies) == sent + 2
    assert set(server.succeeded.values()) == {1}


def test_an_outage_or_a_wrong_key_ends_the_program_and_keeps_the_replies(server, make, monkeypatch):
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    with pytest.raises(JudgeError, match="in a row"):
        make(concurrency=2).complete(ask("a", "b", *(f"FAULT:down {i}" for i in range(50))))
    assert len(server.bodies) < 20
    assert texts(make().complete(ask("b", "a"))) == echoes("b", "a") and server.seen["a"] == 1
    with pytest.raises(JudgeError, match=r"Incorrect API key.*\*\*\*") as e:
        make(concurrency=1).complete(ask("FAULT:denied", "never", "asked"))
    assert KEY not in shown(e) and not server.seen["never"]
    with pytest.raises(JudgeError, match="The URL of an endpoint usually ends in /v1"):
        make(base_url=f"{server.url}/chat").complete(ask("a"))


def test_faults_that_waiting_cannot_fix_end_at_once_with_advice(server, make):
    make().complete(ask("a"))
    with pytest.raises(JudgeError, match=r"exceeded your current quota.*Replies are kept"):
        make(concurrency=1).complete(ask("a", "FAULT:quota", "never"))
    with pytest.raises(JudgeError, match=r"'max_tokens'.* \(max_tokens is set by --sampling: "):
        make().complete(ask("FAULT:unsupported"))
    assert server.seen == {"a": 1, "FAULT:quota": 1, "FAULT:unsupported": 1}
    # Requests in flight are paid, so their replies are kept.
    answer, server.answer = server.answer, lambda text: time.sleep(0.1) or answer(text)
    with pytest.raises(JudgeError, match="exceeded your current quota"):
        make(concurrency=3).complete(ask("b", "FAULT:quota", "c", "never"))
    assert server.succeeded.keys() == {"a", "b", "c"} and make().estimate(ask("a", "b", "c")).cached == 3


def connections(caplog):
    return caplog.text.count("connect_tcp.started")


@pytest.fixture
def unused():
    """A port on which nothing listens."""
    with socket.socket() as bound:  # without listen()
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.parametrize("way", ["direct", "batch"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_endpoint_where_nothing_listens_is_an_immediate_error(make, monkeypatch, caplog, unused, way, host):
    monkeypatch.setenv("NO_PROXY", host)
    url = f"http://{host}:{unused}/v1"
    with pytest.raises(JudgeError) as e:
        make(batch=way == "batch", base_url=url, concurrency=1).complete(ask("a", "b"))
    assert str(e.value).startswith(f"Nothing listens at {url}: the connection is refused. Start the server, ")
    assert "--base-url" in str(e.value) and "\n" not in str(e.value) and connections(caplog) == 1


def test_a_proxy_where_nothing_listens_is_named(server, make, monkeypatch, unused):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{unused}")
    with pytest.raises(JudgeError, match=r"Nothing listens at .*, or at the proxy of HTTP_PROXY or ALL_PROXY"):
        make().complete(ask("a"))


@pytest.mark.parametrize("way", ["direct", "batch"])
def test_a_server_that_disappears_is_asked_again(make, monkeypatch, caplog, way):
    """One connection is enough to ask again, even if it is cut before there is a reply."""
    monkeypatch.setattr(client, "MAX_RETRIES", 3)
    with Server() as server:
        judge = make(batch=way == "batch", base_url=server.url, concurrency=1)
        cut = make(base_url=server.url)
        assert texts(judge.complete(ask("a"))) == ["echo a"]
        with pytest.raises(JudgeError, match="failed every request"):
            cut.complete(ask("FAULT:cut"))
    before = connections(caplog)
    if way == "batch":
        with pytest.raises(JudgeError, match=r"The Batch API of .* failed: Connection error"):
            judge.complete(ask("b"))
    else:
        (reply,) = judge.complete(ask("b"))
        assert re.fullmatch(r"Connection error. \(.+\)", reply.error), "with the cause"
    assert connections(caplog) == before + 4
    with pytest.raises(JudgeError, match="failed every request"):
        cut.complete(ask("b"))
    assert connections(caplog) == before + 8


def test_only_failures_are_an_error_with_the_first_one(server, make, caplog):
    server.said["odd"] = (400, {"error": {"message": "not this one"}}, {})
    with pytest.raises(
        JudgeError, match=r"failed every request \(2\), so there are no results\. The first failure: .*not this one"
    ):
        make(concurrency=1).complete(ask("FAULT:odd", "FAULT:long"))
    with pytest.raises(
        JudgeError, match=r"failed every request \(10\), so there are no results\. The first failure: .*not this"
    ):
        make(concurrency=1).complete(ask("FAULT:odd", *(f"FAULT:long {i}" for i in range(30))))
    with pytest.raises(JudgeError, match=r"failed every request \(2\), so there are no results\. The first failure: "):
        make(batch=True).complete(ask("FAULT:odd", "FAULT:long"))


@pytest.mark.parametrize("fault", ["denied", "forbidden"])
def test_without_a_key_the_error_says_that_it_is_missing(server, make, monkeypatch, fault):
    server.upload_fault = fault
    for in_a_batch in (False, True):
        for key in (KEY, "", " "):
            monkeypatch.setenv("OPENAI_API_KEY", key)
            with pytest.raises(JudgeError) as e:
                make(batch=in_a_batch).complete(ask(f"FAULT:{fault}"))
            assert ("no key was set: set OPENAI_API_KEY. The endpoint says: " in str(e.value)) == (key != KEY)
            assert ("with this key" in str(e.value)) == (key == KEY and fault == "denied" and not in_a_batch)


@pytest.mark.parametrize("way", ["direct", "batch"])
def test_rejected_requests_end_the_program_only_at_the_start(server, make, way):
    """At the end of a program, only a few requests that are too long may be left."""
    long = [f"FAULT:long {i}" for i in range(12)]
    if way == "direct":
        with pytest.raises(JudgeError, match="too long") as e:
            make(concurrency=1).complete(ask(*long))
        assert len(server.bodies) == client.GIVE_UP and KEY not in shown(e)
    judge = make(batch=way == "batch", concurrency=1)
    judge.complete(ask("a"))
    replies = judge.complete(ask(*long, "b"))
    assert all(r.error for r in replies[:-1]) and replies[-1].text == "echo b" and judge.usage.failed == 12
    again = make(batch=way == "batch")
    again.complete(ask("a"))
    assert again.complete(ask("FAULT:long"))[0].error, "what the cache held counts too"


def said(**message):
    return {"choices": [{"message": message, "finish_reason": "length"}]}


def test_impossible_replies_are_errors_and_odd_fields_are_ignored():
    ends = ({"finish_reason": "error"}, {"error": {"code": 502}})
    broke_off = [{"message": {"content": "Is it [[A]]"}, **end} for end in ends]
    none = {"message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}
    choices = ({}, [1], [{}], [{"message": "x"}], [{"message": {"content": [1]}}], *([c] for c in (*broke_off, none)))
    for body in (None, [], "text", {}, *({"choices": each} for each in choices)):
        with pytest.raises(ValueError):
            read_reply(body)
    empty = Reply("", finish_reason="length")
    assert read_reply(said(content=None)) == empty
    assert read_reply(said(content="half \ud83d")) == replace(empty, text="half ?")
    thought = replace(empty, thinking="It is [[A]]", unclosed=True)
    for name in ("reasoning_content", "reasoning"):
        assert read_reply(said(content=None, **{name: "It is [[A]]"})) == thought
        assert read_reply(said(content="B", **{name: "It is [[A]]"})) == replace(thought, text="B", unclosed=False)
        assert read_reply(said(content="B", **{name: [1]})) == replace(empty, text="B")
        assert not read_reply(said(content=None, refusal="No.", **{name: "x"})).unclosed
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "It is "}, {"type": "text", "text": "[[A]]"}]}]
    assert read_reply(said(content=parts)) == thought, "as of Mistral"
    parts.append({"type": "text", "text": "B"})
    assert read_reply(said(content=parts)) == replace(thought, text="B", unclosed=False)
    filtered = {"choices": [{"message": {"content": "Is it [[A]]"}, "finish_reason": "content_filter: SAFETY"}]}
    assert read_reply(filtered).refusal
    for number in (-3, 10**400, True, 1e400, 2.5, "7", None, [1], 10**9 + 1, float("nan")):
        reply = read_reply({**said(content="a"), "usage": {"prompt_tokens": number, "completion_tokens": 3}})
        assert (reply.prompt_tokens, reply.completion_tokens) == (0, 3), number


# ------------------------------------------------------------------------------------------------- replies without end


def test_replies_have_a_size_limit_and_no_compression_and_errors_are_plain_text(server, make, monkeypatch, caplog):
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    why = {
        **dict.fromkeys(("huge", "endless", "huge_error"), "more than 4,194,304 bytes"),
        **{"packed": "encoding 'gzip', which was not asked for", "headers": "", "charset": ""},
        "control": "\\x1b]0;owned\\x07\\x1b[2J\\u202eevil",
    }
    replies = make(concurrency=1).complete(ask("a", *(f"FAULT:{fault}" for fault in why), "b"))
    assert [replies[0].text, replies[-1].text] == echoes("a", "b")
    for reply, (fault, part) in zip(replies[1:-1], why.items(), strict=True):
        assert part in reply.error and reply.error.isprintable(), fault
        # A reply that would be as large again is not paid twice.
        assert server.seen[f"FAULT:{fault}"] == 1 + (fault == "headers")
    assert server.written < 120 * 2**20, "the rest is not waited for; there are buffers in between"
    assert server.headers[0]["accept-encoding"] == "identity"
    assert all(line.isprintable() for line in (r.getMessage() for r in caplog.records if r.name.startswith("judges")))


def test_a_reply_has_a_total_time_limit(server, make, monkeypatch):
    monkeypatch.setattr(bounded, "ATTEMPTS", 2)
    faults = [f"FAULT:{name}" for name in ("trickle", "drip", "informal", "slow")]
    once, *late = make(timeout=0.6).complete(ask("FAULT:trickle*1", *faults))
    assert once.text == "echo FAULT:trickle*1"
    assert all("no whole reply within 0.6 s" in reply.error for reply in late)
    assert [server.seen[fault] for fault in faults] == [2] * 4


@pytest.mark.parametrize("way", ["direct", "batch"])
def test_a_redirect_is_not_followed_but_its_address_shown(server, make, monkeypatch, way):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    with Server() as other:
        location = other.url.replace("//", "//user:pw@") + ("/files" if way == "batch" else "/chat/completions")
        server.said["moved"] = (307, "", {"Location": f"{location}?key=secret#f"})
        server.upload_fault = "moved"
        with pytest.raises(JudgeError, match="not followed") as e:
            make(batch=way == "batch").complete(ask("FAULT:moved"))
        assert not other.headers and not other.bodies
        assert "pw" not in str(e.value) and "secret" not in str(e.value)
        (advised,) = re.findall(r"redirects to (\S+)", str(e.value))
        judge = make(batch=way == "batch", base_url=advised)
        assert advised == other.url and texts(judge.complete(ask("b"))) == ["echo b"]
    for status, location in ((301, "/login"), (303, "javascript:alert(1)"), (304, ""), (307, "http://[")):
        server.said["moved"] = (status, "", {"X-Should-Retry": "true", "Location": location})
        with pytest.raises(JudgeError, match=r"Redirects are not followed.*the endpoint itself with --base-url"):
            make(batch=way == "batch").complete(ask(f"FAULT:moved {status}"))
    assert way == "batch" or set(server.seen.values()) == {1}


def test_proxies_of_the_environment_are_used(server, make, monkeypatch):
    with Server() as proxy:
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        with pytest.raises(JudgeError):  # it is none, and knows no whole addresses
            make().complete(ask("a"))
        assert proxy.headers and not server.headers
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
    with pytest.raises(
        JudgeError, match=r"A proxy of the environment cannot be used .*ALL_PROXY to URLs .* or unset them"
    ):
        make().complete(ask("a"))


# -------------------------------------------------------------------------------------------------------- key, endpoint


def test_a_key_is_in_no_attribute_and_needed_only_for_requests_to_openai(server, make, monkeypatch, tmp_path):
    judge = make()
    assert KEY not in repr(judge) and KEY not in repr(vars(judge)) and KEY not in str(vars(type(judge)))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert texts(judge.complete(ask("a"))) == ["echo a"]
    judge = Client("m", cache=tmp_path / "c.jsonl")
    assert judge.estimate(ask("a")).sent == 1
    with pytest.raises(JudgeError, match="OPENAI_API_KEY is not set"):
        judge.complete(ask("a"))
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/ ")
    assert Client("m", cache=tmp_path / "c.jsonl").endpoint == server.url


@pytest.mark.parametrize(
    ("url", "key"),
    [
        *((f"http://user:{KEY}@host/v1", KEY), (f"http://host/v1?key={KEY}", KEY)),
        (f"http://host/{KEY}/v1", KEY),
        *(("localhost:8000", KEY), ("ftp://x", KEY), ("http://host/v1", "sk-ü"), ("http://host/v1", "sk-a\nb")),
    ],
)
def test_an_unusable_url_or_key_is_an_error_that_does_not_show_the_key(url, key, make, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises((JudgeError, RunError)) as e:
        make(base_url=url)
    assert key not in shown(e) and repr(key)[1:-1] not in shown(e)


# --------------------------------------------------------------------------------------------------------------- kills


def test_a_killed_program_loses_only_open_requests_and_blocks_no_other(tmp_path, caplog, make):
    cache, wanted = tmp_path / "cache.jsonl", [f"q{i}" for i in range(500)]
    with Server(delay=0.05) as server:
        code = (
            "from pathlib import Path\nfrom judges.client import Client\n"
            f"judge = Client('m', cache=Path({str(cache)!r}), base_url={server.url!r}, concurrency=2)\n"
            f"judge.complete([{{'messages': [{{'role': 'user', 'content': q}}]}} for q in {wanted!r}])\n"
        )
        program = [sys.executable, "-c", code]
        first = subprocess.Popen(program, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        wait_for(lambda: cache.exists() and cache.read_bytes().count(b"\n") >= 4)
        done, judge = [], make(base_url=server.url, concurrency=2)
        asked = [*wanted[:30], "mine"]
        waiting = threading.Thread(target=lambda: done.extend(judge.complete(ask(*asked))))
        waiting.start()
        wait_for(lambda: "Waiting for process" in caplog.text)
        assert f"process {first.pid} on " in caplog.text and not server.seen["mine"]
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        waiting.join(timeout=60)
        assert texts(done) == echoes(*asked) and judge.usage.cached >= 4
        holder = (tmp_path / ".cache.jsonl.lock").read_text(encoding="utf-8")
        assert holder == f"process {os.getpid()} on {socket.gethostname()}", "not behind the name of the killed one"
        assert sum(times - 1 for times in server.seen.values()) <= 2, "what was on its way when it was killed"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("way", ["direct", "batch"])
def test_two_concurrent_programs_pay_once(tmp_path, make, way):
    cache = tmp_path / "cache.jsonl"
    with Server(delay=0.02) as server, ThreadPoolExecutor() as pool:
        server.batch_polls = 3
        programs = [
            pool.submit(make(base_url=server.url, batch=way == "batch").complete, ask(*(f"q{i}" for i in range(n))))
            for n in (5, 8)
        ]
        assert [len(texts(program.result(120))) for program in programs] == [5, 8]
        assert set(server.succeeded.values()) == {1} and len(server.succeeded) == 8
        assert sum(len(rows) for rows in server.files.values()) == (8 if way == "batch" else 0)
        assert len(cache.read_text().splitlines()) == 8 and not batch_file(cache).exists()


def test_a_stopped_program_does_not_submit_a_batch_twice(server, make, monkeypatch):
    def stopped(seconds):
        raise KeyboardInterrupt

    wanted = [f"q{i}" for i in range(6)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batch, "asyncio", SimpleNamespace(run=batch.asyncio.run, sleep=stopped))
        server.batch_polls = 10
        make(batch=True).complete(ask(*wanted[:5]))
    server.batch_polls = 0
    with pytest.raises(JudgeError, match=r"5 of these requests are in a submitted batch.*Use --batch to wait for it"):
        make().complete(ask(*wanted))
    assert not server.seen and texts(make().complete(ask("c"))) == ["echo c"]
    assert texts(make(batch=True).complete(ask(*wanted))) == echoes(*wanted)
    assert [len(rows) for rows in server.files.values()] == [5, 1]
    assert set(server.succeeded.values()) == {1}


# ----------------------------------------------------------------------------------------------------------- Batch API


def test_the_batch_api_gives_the_same_replies_into_the_same_cache(server, make, monkeypatch):
    make().complete(ask("a"))
    output = server.output
    server.batch_polls = 3
    judge = make(batch=True)
    *fine, failed = judge.complete(ask("a", "b", "c", "b", "FAULT:down"))
    assert texts(fine) == echoes("a", "b", "c", "b") and "500" in failed.error
    assert len(server.batches) == 1 and len(server.files["file-0"]) == 3 and server.seen == {"a": 1}
    assert server.files["file-0"][0]["url"] == "/v1/chat/completions"
    assert (judge.usage.sent, judge.usage.prompt_tokens) == (3, 20)
    assert not batch_file(judge.cache.path).exists()
    assert texts(make().complete(ask("c", "b"))) == echoes("c", "b") and server.seen == {"a": 1}
    monkeypatch.setattr(batch, "MOST_REQUESTS", 3)
    make(batch=True).complete(ask("a", "d", "FAULT:down", "e", "f"))
    made = [[row["body"]["messages"][0]["content"] for row in rows] for rows in server.files.values()]
    assert made[1:] == [["d", "FAULT:down", "e"], ["f"]]
    monkeypatch.setattr(batch, "MOST_BYTES", 300)
    make(batch=True).complete(ask("x" * 100, "y" * 100))
    assert len(server.batches) == 5
    error = '"body": {"error": {"code": "content_filter"}}'
    server.output = lambda name, errors: output(name, errors).replace('"body": {}', error)
    (filtered,) = make(batch=True).complete(ask("FAULT:down again"))
    assert filtered.refusal and not filtered.error


def test_a_batch_is_found_although_the_program_died_before_it_knew_its_id(server, make):
    """The program was killed, or the connection cut, between the creation of a batch and the answer."""
    file, make_batch, remembered = batch_file(make().cache.path), server.make_batch, []

    def making(handler, body):
        remembered.append([entry["id"] for entry in json.loads(file.read_text())["batches"]])
        make_batch(handler, body)

    server.make_batch, server.batch_fault = making, "lose"
    assert texts(make(batch=True).complete(ask("a"))) == ["echo a"]
    assert len(server.batches) == 1 and remembered == [[None]], "on record before it is made"
    server.batch_fault = ""
    bodies = make().bodies(ask("b"))
    server.files["file-1"] = [{"custom_id": key, "body": body} for key, body in bodies.items()]
    server.batches["batch-1"] = {"input_file_id": "file-1", "metadata": {"trace_bench": "tag"}, "polls": 0}
    entry = {"tag": "tag", "id": None, "endpoint": server.url, "keys": list(bodies)}
    never = {**entry, "tag": "never made", "keys": list(make().bodies(ask("c")))}
    elsewhere = {**never, "endpoint": "http://elsewhere/v1"}
    file.write_text(json.dumps({"batches": [entry, never, elsewhere]}))
    assert texts(make(batch=True).complete(ask("b", "c"))) == echoes("b", "c")
    assert len(server.batches) == 3 and set(server.succeeded.values()) == {1}
    assert json.loads(file.read_text()) == {"batches": [elsewhere]}


@pytest.mark.parametrize("fault, message", [("refuse", r"no, Bearer \*\*\*"), ("fail", "bad file")])
def test_a_batch_that_is_refused_or_fails_is_an_error(server, make, fault, message):
    server.batch_fault = fault
    judge = make(batch=True)
    with pytest.raises(JudgeError, match=message) as e:
        judge.complete(ask("a"))
    assert KEY not in shown(e) and not batch_file(judge.cache.path).exists()
    server.batch_fault = ""
    assert texts(make(batch=True).complete(ask("a"))) == ["echo a"], "nothing is left behind"
    with pytest.raises(JudgeError, match="Leave out --batch"):
        make(batch=True, base_url=server.url + "/nothing").complete(ask("b"))
    batch_file(judge.cache.path).write_text('{"batches": 5}')
    with pytest.raises(RunError, match=r"cache.batches.json is damaged.*Delete it"):
        make(batch=True).complete(ask("c"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("id", 7), ("id", "../../v2"), ("id", "a\nb"), ("status", {"a": 1}), ("status", "\x1b[2J")),
        *(("output_file_id", "a/../b?c"), ("output_file_id", 5), ("request_counts", None), ("metadata", [1])),
        *(("request_counts", {"completed": 10**400, "failed": "x"}), ("errors", {"data": "none"})),
    ],
)
def test_invalid_answers_of_a_batch_api_are_ignored_or_one_error(server, make, field, value):
    batch = server.batch
    server.batch = lambda name: {**batch(name), field: value}
    if field in ("id", "status", "output_file_id"):
        with pytest.raises(JudgeError, match=r"unusable reply|did not accept the batch") as e:
            make(batch=True).complete(ask("a"))
        assert str(e.value).isprintable()
    else:
        assert texts(make(batch=True).complete(ask("a"))) == ["echo a"]


@pytest.mark.parametrize("rows", [5, [5], [{"id": 1}], [{"id": "x", "metadata": "tag"}]])
def test_an_endless_list_of_batches_is_read_to_a_limit(server, make, monkeypatch, rows):
    monkeypatch.setattr(batch, "MOST_PAGES", 3)
    server.batch_fault, asked = "lose", []

    def listed(handler, path):
        asked.append(path)
        server.send(handler, 200, {"data": rows, "has_more": True})

    server.get = listed
    with pytest.raises(JudgeError):
        make(batch=True).complete(ask("a"))
    assert 1 <= len(asked) <= 3


def test_the_file_of_a_batch_has_a_size_limit_and_only_expected_replies_count(server, make, monkeypatch):
    monkeypatch.setattr(batch, "MOST_REPLY", 10_000)
    key, output = next(iter(make().bodies(ask("b")))), server.output
    forged = {"custom_id": key, "response": {"status_code": 200, "body": server.completion("forged")}}
    server.output = lambda name, errors: output(name, errors) + f'\n{json.dumps(forged)}\n{{"custom_id": []}}\n'
    judge = make(batch=True)
    assert texts(judge.complete(ask("a"))) == ["echo a"] and key not in judge.cache
    server.output = lambda name, errors: "x" * 50_000
    with pytest.raises(JudgeError, match="more than 20,000 bytes"):
        make(batch=True).complete(ask("b"))
