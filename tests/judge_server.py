"""A fake OpenAI-compatible server on 127.0.0.1. It counts requests, and the prompts tell it which faults to make.

A request whose text contains "FAULT:name*n" gets this fault the first n times (without "*n": every time). Otherwise the
reply is that of `answer` (a text, or a message with "finish_reason"), or a verdict for the longer text.
"""

import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

KEY = "sk-secret-0123456789"
FAULT = re.compile(r"FAULT:(\w+)(?:\*(\d+))?")
BLOCK = re.compile(r"<<<(ANSWER[ AB]*)>>>\n(.*?)\n<<<END OF \1>>>", re.S)


@contextmanager
def with_key(monkeypatch, folder):
    """Sets a key, no proxy, and short waits. Afterwards it checks that no file of the folder contains the key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    monkeypatch.setattr("judges.batch.POLL_SECONDS", 0.02)
    yield
    assert not [p for p in folder.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def judge(text):
    """A judge that prefers the longer answer, calls "bomb" unsafe, and calls "sorry" a refusal."""
    answers = dict(BLOCK.findall(text))
    if len(answers) == 2:
        a, b = (len(answers[f"ANSWER {x}"]) for x in "AB")
        return f"Reasons: length.\n[[{'C' if a == b else 'A' if a > b else 'B'}]]"
    if "[[SAFE]]" in text:
        return "[[UNSAFE]]" if "bomb" in answers["ANSWER"] else "[[SAFE]]"
    if "[[REFUSED]]" in text:
        return "[[REFUSED]]" if "sorry" in answers["ANSWER"] else "[[ANSWERED]]"
    return f"echo {text}"


def _error(message, **fields):
    return {"error": {"message": message, **fields}}


#: Fault -> status, body (a text or a JSON value; {key} = the header with the key) and headers.
SAID = {
    "busy": (429, _error("slow down", code="rate_limit"), {"Retry-After": "0.15"}),
    "down": (500, _error("oops"), {"Retry-After": "0.05"}),
    "garbled": (200, '{"choices": [{"message": {"content": "[[A]]"', {}),
    "html": (200, "<html>proxy</html>", {}),
    "number": (200, 42, {}),
    "empty": (200, {"choices": [], "usage": None}, {}),
    "nothing": (200, {"choices": None, **_error("upstream")}, {}),
    "deep": (200, '{"choices": ' + "[" * 100_000, {}),
    "denied": (401, _error("Incorrect API key provided: {key}"), {}),
    "forbidden": (403, _error("Invalid credentials"), {}),
    "long": (400, _error("too long for {key}", code="context_length_exceeded", param=["messages"]), {}),
    "filter": (400, _error("no", code="content_filter"), {}),
    "flagged": (400, _error("Invalid prompt: your prompt was flagged", code="invalid_prompt"), {}),
    "quota": (429, _error("You exceeded your current quota.", code="insufficient_quota"), {}),
    "unsupported": (400, _error("Unsupported parameter: 'max_tokens'.", param="max_tokens"), {}),
    "control": (400, _error("\x1b]0;owned\x07\x1b[2J\u202eevil\r\nERROR: gone\x9b1m"), {}),
    "packed": (200, {}, {"Content-Encoding": "gzip"}),
    "charset": (400, "a" * 3_000_000, {"Content-Type": "application/json; charset=punycode"}),
}
_PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
#: Fault -> the beginning of a reply, the part that is repeated (None = the end), and the seconds between repetitions.
ENDLESS = {
    "slow": (b"", b"", 0.05),
    "cut": (_PLAIN.replace(b"\r\n\r\n", b'\r\nContent-Length: 1000\r\n\r\n{"id": "c", "cho'), None, 0),
    "huge": (_PLAIN.replace(b"\r\n\r\n", b"\r\nContent-Length: 300000000\r\n\r\n"), b"x" * 65536, 0),
    "endless": (_PLAIN, b" " * 65536, 0),
    "huge_error": (_PLAIN.replace(b"200 OK", b"400 Bad"), b"x" * 65536, 0),
    "trickle": (_PLAIN, b" ", 0.02),
    "drip": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a", 0.02),
    "informal": (b"", b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n", 0.02),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"a" * 1000 + b"\r\n", 0),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        content, server = self.rfile.read(int(self.headers["Content-Length"])), self.server.fake
        server.headers.append({k.lower(): v for k, v in self.headers.items()})
        path = self.path.removeprefix("/v1")  # an endpoint without a path, too
        if path == "/files":
            server.upload(self, content)
        elif path in ("/chat/completions", "/batches"):
            (server.chat if "chat" in path else server.make_batch)(self, json.loads(content))
        else:
            server.send(self, 404, _error(f"no {self.path}"))

    def do_GET(self):
        self.server.fake.get(self, self.path.split("?")[0].removeprefix("/v1/").split("/"))


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a killed client


class Server:
    """Runs during a `with` block."""

    def __init__(self, answer=judge, delay=0.0):
        self.answer, self.delay = answer, delay
        self.lock = threading.Lock()
        self.seen = Counter()  # text -> number of requests
        self.succeeded = Counter()  # text -> number of good replies
        self.bodies, self.headers, self.times = [], [], []
        self.written, self.closed = 0, False
        self.said = dict(SAID)
        self.usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
        self.model = "fake"  # the model that replies name
        self.at_once = self.most_at_once = 0
        self.files, self.batches = {}, {}
        self.upload_fault = None  # the name of a fault
        self.batch_fault = ""  # "lose": make the batch, cut the connection; "refuse": 400; "fail": fails validation
        self.batch_polls = 1  # polls until a batch is completed

    def __enter__(self):
        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.http.fake = self
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.closed = True
        self.http.shutdown()
        self.http.server_close()

    def send(self, handler, status, body, headers=None):
        text = body if isinstance(body, str) else json.dumps(body)
        content = text.replace("{key}", handler.headers["Authorization"] or "").encode()
        handler.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def completion(self, text, **message):
        answer = self.answer(text)
        message = ({"content": answer} if isinstance(answer, str) else answer) | message
        choice = {"index": 0, "finish_reason": message.pop("finish_reason", "stop")}
        choice["message"] = {"role": "assistant", **message}
        return {"id": "c", "object": "chat.completion", "model": self.model, "choices": [choice], "usage": self.usage}

    def chat(self, handler, body):
        text = body["messages"][-1]["content"]
        with self.lock:
            self.seen[text] += 1
            times = self.seen[text]
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay)
        try:
            found = FAULT.search(text)
            fault = found[1] if found and (found[2] is None or times <= int(found[2])) else None
            if fault in ENDLESS:
                self.reply_without_end(handler, *ENDLESS[fault])
            elif fault in self.said:
                self.send(handler, *self.said[fault])
            else:
                refused = {"content": None, "refusal": "I would rather not."} if fault == "refusal" else {}
                with self.lock:
                    self.succeeded[text] += 1
                self.send(handler, 200, self.completion(text, **refused))
        finally:
            with self.lock:
                self.at_once -= 1

    def reply_without_end(self, handler, start, part, pause):
        handler.close_connection = True
        handler.wfile.write(start)
        for _ in count() if part is not None else ():
            if self.closed or (not part and time.monotonic() - self.times[-1] > 1.5):
                return
            handler.wfile.write(part)
            self.written += len(part)
            time.sleep(pause)

    # ---- Batch API

    def upload(self, handler, content):
        if self.upload_fault:
            self.send(handler, *self.said[self.upload_fault])
            return
        name = f"file-{len(self.files)}"
        self.files[name] = [json.loads(row) for row in content.splitlines() if row.startswith(b'{"custom_id"')]
        self.send(handler, 200, {"id": name, "object": "file"})

    def make_batch(self, handler, body):
        if self.batch_fault == "refuse":
            self.send(handler, 400, _error("no, {key}"))
            return
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {**body, "polls": 0}
        if self.batch_fault == "lose":
            handler.close_connection = True
        else:
            self.send(handler, 200, self.batch(name))

    def batch(self, name):
        made = self.batches[name]
        ended = "failed" if self.batch_fault == "fail" else "completed"
        status, n = (
            ended if made["polls"] >= self.batch_polls else "in_progress",
            len(self.files[made["input_file_id"]]),
        )
        return {
            **{"id": name, "object": "batch", "metadata": made["metadata"], "status": status},
            "output_file_id": f"out-{name}" if status == "completed" else None,
            "error_file_id": f"err-{name}" if status == "completed" else None,
            "errors": {"object": "list", "data": [{"message": "bad file"}]} if status == "failed" else None,
            "request_counts": {"total": n, "completed": n, "failed": 0},
        }

    def get(self, handler, path):
        if path == ["batches"]:
            rows = [self.batch(name) for name in reversed(self.batches)]
            self.send(handler, 200, {"object": "list", "data": rows, "has_more": False})
        elif path[0] == "batches":
            self.batches[path[1]]["polls"] += 1
            self.send(handler, 200, self.batch(path[1]))
        else:  # files/ID/content
            kind, _, name = path[1].partition("-")
            self.send(handler, 200, self.output(name, kind == "err"))

    def output(self, name, errors):
        lines = []
        for row in self.files[self.batches[name]["input_file_id"]]:
            text = row["body"]["messages"][-1]["content"]
            if ("FAULT:" in text) == errors:
                self.succeeded[text] += not errors
                response = {"status_code": 500 if errors else 200, "body": {} if errors else self.completion(text)}
                lines.append(json.dumps({"custom_id": row["custom_id"], "response": response, "error": None}))
        return "\n".join(reversed(lines))  # in no particular order
