"""A pool to ask the API about: real store, real loops, fake machines on a virtual clock, the real server."""

import hashlib
import http.client
import json
import socket
import textwrap
import threading
from contextlib import contextmanager
from dataclasses import dataclass

from nodepool.api.app import create_app
from nodepool.api.server import ApiServer
from nodepool.clock import VirtualClock
from nodepool.cmd.wiring import Current, Daemon, Parts
from nodepool.config import load
from nodepool.drivers import fake
from nodepool.drivers.step import Ports
from nodepool.errors import Code, Permanent
from nodepool.image.make import ImageResult
from nodepool.loops.launcher import Kit
from nodepool.loops.running import InlineExecutor
from nodepool.metrics import NoMetrics
from nodepool.model import Node, NodeState
from nodepool.service.agents import Desk
from nodepool.store import open_store

YAML = """
version: 1
images-dir: %(folder)s/images
diskimages: [{name: debian, release: bookworm, elements: [debian-minimal]}]
labels: [{name: small, min-ready: %(min_ready)s}]
providers:
  - name: lab
    driver: fake
    count: %(machines)s
    delay: 1
    failures: %(failures)s
    pools: [{name: main, labels: [{name: small, diskimage: debian}]}]
"""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict
    body: dict

    @property
    def items(self):
        return self.body["items"]


class Pool:
    """A daemon without threads of its own: time passes when a test lets it."""

    def __init__(self, folder, *, machines=3, min_ready=1, failures="{}"):
        self.folder = folder
        self.clock = VirtualClock()
        self.path = folder / "np.sock"
        self.broken_images = set()
        yaml = folder / "nodepool.yaml"
        yaml.write_text(
            textwrap.dedent(
                YAML % {"folder": folder, "machines": machines, "min_ready": min_ready, "failures": failures}
            )
        )
        self.current = Current(load(yaml))
        self.store = open_store(f"sqlite:///{folder}/nodepool.db", self.clock)
        self.commits = 0
        self.store.wake.append(self._count)
        self.desk = Desk(self.store, self.current)
        self.world = fake.World(self.desk, self.clock)
        self.world.configure(self.current().config)
        ports = Ports(self.world, self.world, "ssh-ed25519 AAAAnodepool nodepool")
        kit = Kit(fake.JOBS, fake.entry, lambda _provider: ports)
        parts = Parts({"fake": kit}, self._make, InlineExecutor(), InlineExecutor(), NoMetrics())
        self.daemon = Daemon(self.store, self.current, parts, {"world": self.world})
        self.looks = 0  # how often the API has read the planner's reasons
        self._looked = threading.Condition()
        app = create_app(self.store, self.current, self._reasons, self._status)
        self.server = ApiServer(app, self.path)
        self.sick = False

    def _count(self):
        self.commits += 1

    def _reasons(self):
        with self._looked:
            self.looks += 1
            self._looked.notify_all()
        return self.daemon.planner.reasons

    def wait_for_looks(self, count):
        """Until the API has read the planner's reasons so often."""
        with self._looked:
            assert self._looked.wait_for(lambda: self.looks >= count, 20)

    def _status(self):
        if self.sick:
            raise RuntimeError("a defect")
        return {"version": "0", "loops": {"planner": self.daemon.planner.sentence}}

    def _make(self, recipe, build_id, _config, progress, _cancelled):
        progress("root.d", 0.4)
        if recipe.name in self.broken_images:
            raise Permanent("debootstrap: no such suite", Code.IMAGE_BUILD)
        path = self.folder / f"{build_id}.raw"
        path.write_bytes(b"image")
        return ImageResult({"raw": path}, 5, hashlib.sha256(b"image").hexdigest(), 1.0, self.folder / "log")

    def settle(self):
        """Let happen what needs no time; gives when the next thing is due (0: nothing is)."""
        while True:
            before = self.commits
            due = [when for loop in self.daemon.loops.values() if (when := loop.pass_once())]
            if self.commits == before and not any(when <= self.clock.now() for when in due):
                return min(due, default=0)

    def run(self, done, limit=7200):
        """Let time pass until `done`."""
        end = self.clock.now() + limit * 1_000_000
        while True:
            due = self.settle()
            if done():
                return
            assert due, "nothing more will happen"
            assert due <= end, "it did not happen in time"
            self.clock.move_to(due)

    def until(self, *states):
        """Let time pass until the nodes that are not gone are in these states."""
        self.run(lambda: sorted(str(node.state) for node in self.nodes()) == sorted(states))

    def nodes(self):
        found = self.store.read(lambda tx: tx.select(Node))
        return [node for node in found if node.state is not NodeState.DELETED]

    def ask(self, method, path, body=None):
        """One request at the socket."""
        connection = _Connection(self.path)
        try:
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, "/api/v1" + path, raw, {"Content-Type": "application/json"} if raw else {})
            response = connection.getresponse()
            text = response.read()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(text))
        finally:
            connection.close()

    def get(self, path):
        return self.ask("GET", path)

    def post(self, path, body=None):
        return self.ask("POST", path, body)

    def delete(self, path):
        return self.ask("DELETE", path)

    def request(self, *labels, **more):
        """Queue a request; gives its id."""
        made = self.post("/requests", {"nodes": [{"label": label} for label in labels], **more})
        assert made.status == 201, made
        return made.body["id"]


class _Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


@contextmanager
def served(folder, **kinds):
    """A pool whose API answers."""
    pool = Pool(folder, **kinds)
    pool.server.start()
    try:
        yield pool
    finally:
        pool.server.stop()
        pool.store.close()


@contextmanager
def beside(work):
    """Run `work` in a thread meanwhile; gives a list that has its result at the end."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    try:
        yield results
    finally:
        thread.join(30)
        assert not thread.is_alive()
