"""A fake OpenAI-compatible server on 127.0.0.1 whose faults are written into the prompts, and which counts.

A request whose text holds "FAULT:name*n" gets that fault the first n times (without "*n": every time). Otherwise the
answer is that of `answer` (a text, or a message with "finish_reason"), or a verdict for the longer text.
"""

import gzip
import json
import re
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


@contextmanager
def with_key(monkeypatch, folder):
    """A key in the environment and no proxy; afterwards no file of the folder holds the key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert not [p for p in folder.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


FAULT = re.compile(r"FAULT:(\w+)(?:\*(\d+))?")
BLOCK = re.compile(r"<<<(ANSWER[ AB]*)>>>\n(.*?)\n<<<END OF \1>>>", re.S)


@cache
def bomb():
    """A gzip file of 100 MB of nothing."""
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(bytes(1_000_000)) for _ in range(100)) + packer.flush()


def judge(text):
    """A judge that prefers the longer answer, finds "bomb" unsafe, and takes "sorry" for a refusal."""
    answers = dict(BLOCK.findall(text))
    if len(answers) == 2:
        a, b = (len(answers[f"ANSWER {x}"]) for x in "AB")
        return f"Reasons: length.\n[[{'C' if a == b else 'A' if a > b else 'B'}]]"
    if "[[SAFE]]" in text:
        return "[[UNSAFE]]" if "bomb" in answers["ANSWER"] else "[[SAFE]]"
    if "[[REFUSED]]" in text:
        return "[[REFUSED]]" if "sorry" in answers["ANSWER"] else "[[ANSWERED]]"
    return f"echo {text}"


class Server:
    """Runs while the `with` block does."""

    def __init__(self, answer=judge, delay=0.0):
        self.answer, self.delay = answer, delay
        self.lock = threading.Lock()
        self.seen = Counter()  # text -> times asked
        self.succeeded = Counter()  # text -> times answered well
        self.bodies, self.headers, self.times = [], [], []
        self.written, self.closed = 0, False
        self.usage, self.location = {}, ""
        self.at_once = self.most_at_once = 0
        self.files, self.batches = {}, {}
        self.batch_fault = ""  # "lose": make the batch, cut the connection; "refuse": 400; "fail": fails validation
        self.batch_polls = 1  # polls until a batch is completed

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                server.headers.append({k.lower(): v for k, v in self.headers.items()})
                if self.path == "/v1/chat/completions":
                    server.chat(self, json.loads(content))
                elif self.path == "/v1/files":
                    server.upload(self, content)
                elif self.path == "/v1/batches":
                    server.make_batch(self, json.loads(content))
                else:
                    server.send(self, 404, {"error": {"message": f"no {self.path}"}})

            def do_GET(self):
                server.get(self, self.path.split("?")[0].removeprefix("/v1/").split("/"))

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # clients that were killed

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.closed = True
        self.http.shutdown()
        self.http.server_close()

    def send(self, handler, status, body, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(content)

    def completion(self, text, **message):
        answer = self.answer(text)
        # An answer may also be a message, with the reason of its end.
        message = {"content": answer, **message} if isinstance(answer, str) else {**answer, **message}
        return {
            "id": "c",
            "object": "chat.completion",
            "model": "fake",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": message.pop("finish_reason", "stop"),
                    "message": {"role": "assistant", **message},
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
        }

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
            fault = found and (found[2] is None or times <= int(found[2])) and found[1]
            if fault and getattr(self, f"fault_{fault}")(handler, text) != "fine":
                return
            with self.lock:
                self.succeeded[text] += 1
            self.send(handler, 200, self.completion(text)) if not fault else None
        finally:
            with self.lock:
                self.at_once -= 1

    # ---- faults

    def fault_busy(self, handler, text):
        self.send(handler, 429, {"error": {"message": "slow down", "code": "rate_limit"}}, Retry_After=0.15)

    def fault_down(self, handler, text):
        self.send(handler, 500, {"error": {"message": "oops"}}, Retry_After=0.05)

    def fault_slow(self, handler, text):
        time.sleep(1.5)
        handler.close_connection = True

    def fault_cut(self, handler, text):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"id": "c", "cho')
        handler.close_connection = True

    def fault_garbled(self, handler, text):
        self.send(handler, 200, b'{"choices": [{"message": {"content": "[[A]]"')

    def fault_html(self, handler, text):
        self.send(handler, 200, b"<html>proxy</html>")

    def fault_number(self, handler, text):
        self.send(handler, 200, b"42")

    def fault_empty(self, handler, text):
        self.send(handler, 200, {"choices": [], "usage": None})

    def fault_nothing(self, handler, text):
        self.send(handler, 200, {"choices": None, "error": {"message": "upstream"}})

    def fault_deep(self, handler, text):
        self.send(handler, 200, b'{"choices": ' + b"[" * 100_000)

    def fault_denied(self, handler, text):
        key = handler.headers["Authorization"]
        self.send(handler, 401, {"error": {"message": f"Incorrect API key provided: {key}"}})

    def fault_long(self, handler, text):
        key = handler.headers["Authorization"]
        self.send(handler, 400, {"error": {"message": f"too long for {key}", "code": "context_length_exceeded"}})

    def fault_filter(self, handler, text):
        self.send(handler, 400, {"error": {"message": "no", "code": "content_filter"}})

    def fault_refusal(self, handler, text):
        self.send(handler, 200, self.completion(text, content=None, refusal="I would rather not."))
        with self.lock:
            self.succeeded[text] += 1

    # ---- replies without end

    def begin(self, handler, status=200, **headers):
        handler.send_response(status)
        for name, value in {"Content_Type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.close_connection = True

    def endless(self, handler, part, pause=0.0):
        while not self.closed:
            handler.wfile.write(part)
            self.written += len(part)
            time.sleep(pause)

    def fault_huge(self, handler, text):
        self.begin(handler, Content_Length=300_000_000)
        handler.wfile.write(b'{"choices": [{"message": {"content": "')
        self.endless(handler, b"x" * 65536)

    def fault_endless(self, handler, text):
        self.begin(handler)
        self.endless(handler, b" " * 65536)

    def fault_huge_error(self, handler, text):
        self.begin(handler, 400)
        self.endless(handler, b"x" * 65536)

    def fault_trickle(self, handler, text):
        self.begin(handler)
        self.endless(handler, b" ", 0.02)

    def fault_drip(self, handler, text):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        handler.close_connection = True
        self.endless(handler, b"a", 0.02)

    def fault_informal(self, handler, text):
        handler.close_connection = True
        self.endless(handler, b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n", 0.02)

    def fault_headers(self, handler, text):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        handler.close_connection = True
        self.endless(handler, b"X-A: " + b"a" * 1000 + b"\r\n")

    def fault_bomb(self, handler, text):
        self.send(handler, 200, bomb(), Content_Encoding="gzip")

    def fault_packed(self, handler, text):
        self.send(handler, 200, gzip.compress(json.dumps(self.completion(text)).encode()), Content_Encoding="gzip")

    def fault_cut_gzip(self, handler, text):
        self.send(handler, 200, gzip.compress(b'{"choices": []}')[:-9], Content_Encoding="gzip")

    def fault_brotli(self, handler, text):
        self.send(handler, 200, b"\x8b\x02\x80", Content_Encoding="br")

    def fault_twice(self, handler, text):
        self.send(handler, 200, gzip.compress(gzip.compress(b"{}")), Content_Encoding="gzip, gzip")

    def fault_charset(self, handler, text):
        self.send(handler, 400, b"a" * 3_000_000, Content_Type="application/json; charset=punycode")

    def fault_counts(self, handler, text):
        self.send(handler, 200, {**self.completion(text), "usage": self.usage})

    def fault_control(self, handler, text):
        self.send(handler, 400, {"error": {"message": "\x1b]0;owned\x07\x1b[2J\u202eevil\r\nERROR: gone\x9b1m"}})

    def fault_moved(self, handler, text):
        self.send(handler, 307, b"", Location=self.location)

    # ---- Batch API

    def upload(self, handler, content):
        name = f"file-{len(self.files)}"
        lines = [line for line in content.splitlines() if line.startswith(b'{"custom_id"')]
        self.files[name] = [json.loads(line) for line in lines]
        self.send(handler, 200, {"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "f",
                                 "purpose": "batch", "status": "processed"})  # fmt: skip

    def make_batch(self, handler, body):
        if self.batch_fault == "refuse":
            self.send(handler, 400, {"error": {"message": f"no, {handler.headers['Authorization']}"}})
            return
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {**body, "polls": 0}
        if self.batch_fault == "lose":
            handler.close_connection = True
            return
        self.send(handler, 200, self.batch(name))

    def batch(self, name):
        made = self.batches[name]
        ended = "failed" if self.batch_fault == "fail" else "completed"
        status = ended if made["polls"] >= self.batch_polls else "in_progress"
        requests = self.files[made["input_file_id"]]
        return {
            "id": name, "object": "batch", "endpoint": made["endpoint"], "completion_window": "24h", "created_at": 1,
            "input_file_id": made["input_file_id"], "metadata": made["metadata"], "status": status,
            "output_file_id": f"out-{name}" if status == "completed" else None,
            "error_file_id": f"err-{name}" if status == "completed" else None,
            "errors": {"object": "list", "data": [{"message": "bad file"}]} if status == "failed" else None,
            "request_counts": {"total": len(requests), "completed": len(requests), "failed": 0},
        }  # fmt: skip

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
            if ("FAULT:" in text) != errors:
                continue
            self.succeeded[text] += not errors
            response = {"status_code": 500 if errors else 200, "body": {} if errors else self.completion(text)}
            lines.append(json.dumps({"id": "r", "custom_id": row["custom_id"], "response": response, "error": None}))
        return "\n".join(reversed(lines)).encode()  # in no particular order
