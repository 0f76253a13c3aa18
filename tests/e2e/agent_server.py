"""The daemon's side of the agent's protocol, small and real: HTTP, one boot, operations one after another.

It is written from doc/agent-protocol.rst alone, and keeps all that it was told, so that tests can look at it.
"""

import http.server
import itertools
import os
import re
import socket
import threading
import time
from urllib.parse import quote, unquote

LINES = re.compile(rb"(?:[a-z0-9._-]+=(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})*\n)*")


def body_of(values):
    return "".join(f"{key}={quote(str(value), safe='-._~')}\n" for key, value in values.items()).encode()


def wait_until(look, seconds=30.0, describe=str):
    """Look at what has no event to wait for (a file that another process writes) until it is there."""
    until = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < until, f"not seen in {seconds} s: {describe()}"
        time.sleep(0.05)


def values_of(body):
    assert LINES.fullmatch(body), body
    return {key: unquote(value) for key, _, value in (line.partition("=") for line in body.decode().splitlines())}


class Daemon:
    """Serves one boot; use it as a context.

    `files` maps paths to content; `answers` are given first;
    `deaf` is how many last reports are lost before one is heard.
    """

    def __init__(self, listener: socket.socket, hold=5.0) -> None:
        self.token = "0123456789abcdef0123456789abcdef"
        self.files = {}
        self.answers = []
        self.deaf = 0
        self.hellos = []
        self.reports = []
        self.requests = []
        self._hold = hold
        self._numbers = itertools.count(1)
        self._instruction = {}
        self._cancel = ""
        self._news = threading.Condition()
        self._server = _Server(listener, self)
        host, port = listener.getsockname()
        self.url = f"http://{host}:{port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_):
        with self._news:
            self._hold = 0.0
            self._news.notify_all()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def carry_out(self, kind, seconds=60.0, **parameters):
        """Give an operation and wait for its last report."""
        return self.wait_for_end(self.give(kind, **parameters), seconds)

    def give(self, kind, **parameters):
        with self._news:
            self._instruction = {"operation": f"op-{next(self._numbers)}", "kind": kind, **parameters}
            self._news.notify_all()
            return self._instruction["operation"]

    def repeat(self, number):
        """Give an earlier operation again, as a daemon does that has not heard its end."""
        with self._news:
            self._instruction = {**self._instruction, "operation": number}
            self.reports = [report for report in self.reports if report.get("operation") != number]
            self._news.notify_all()

    def cancel(self, number):
        with self._news:
            self._cancel = number

    def wait_for_end(self, number, seconds=60.0):
        return self.wait_for(
            lambda: next((r for r in self.reports if r.get("operation") == number and r["state"] != "running"), None),
            seconds,
        )

    def wait_for(self, look, seconds=60.0):
        """What `look` finds among what was told, once it finds something."""
        with self._news:
            assert self._news.wait_for(look, seconds), f"nothing came in {seconds} s; reports: {self.reports[-5:]}"
            return look()

    def hello(self, told):
        with self._news:
            self.hellos.append(told)
            self._news.notify_all()
            if self.answers:
                return self.answers.pop(0)
        if told.get("token") != self.token:
            return 403, {"error": "no such token"}
        return 200, {"boot": "41"}

    def poll(self, told):
        number = told.get("operation", "")
        with self._news:
            self.reports.append(told)
            self._news.notify_all()
            if self.answers:
                return self.answers.pop(0)
            if told.get("state") in {"done", "failed"} and self.deaf:
                self.deaf -= 1
                return 500, {"error": "not heard"}
            if told.get("state") == "running":
                if number == self._cancel:
                    self._instruction, self._cancel = {}, ""
                    return 200, {"cancel": 1}
                return 200, {"continue": 1}
            if number and number == self._instruction.get("operation"):
                self._instruction = {}
            if not number:
                self._news.wait_for(lambda: self._instruction or not self._hold, self._hold)
            return 200, dict(self._instruction) or {"wait": 0}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, listener, daemon) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.nodepool = daemon

    def handle_error(self, request, client_address):
        """A client that goes away in the middle (a cancelled transfer, a machine switched off) is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_):
        pass

    def do_POST(self):
        daemon = self.server.nodepool
        told = values_of(self.rfile.read(int(self.headers["Content-Length"])))
        handle = {"/agent/v1/hello": daemon.hello, "/agent/v1/poll": daemon.poll}[self.path]
        status, values = handle(told)
        self.answer(status, body_of(values))

    def do_GET(self):
        self.server.nodepool.requests.append((self.path, self.headers.get("Range", "")))
        content = self.server.nodepool.files.get(self.path)
        if callable(content):
            content = content()
        if content is None:
            self.answer(404, b"error=no%20such%20file\n")
            return
        named = hasattr(content, "fileno")
        size = os.fstat(content.fileno()).st_size if named else len(content)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last), size - 1)
        part = os.pread(content.fileno(), last - first + 1, first) if named else content[first : last + 1]
        self.answer(206, part, {"Content-Range": f"bytes {first}-{last}/{size}"})

    def answer(self, status, body, headers=()):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name in headers:
            self.send_header(name, headers[name])
        self.end_headers()
        self.wfile.write(body)
