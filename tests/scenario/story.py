"""The whole daemon in one thread: real store, real loops, fake machines, a clock that moves to what is due next."""

import functools
import hashlib
import tempfile
import textwrap
from pathlib import Path

from nodepool.clock import VirtualClock
from nodepool.cmd.wiring import Current, Daemon, Parts
from nodepool.config import load
from nodepool.coord.local import LocalReferee, file_lock
from nodepool.drivers import fake
from nodepool.drivers.step import Ports
from nodepool.errors import Code, Permanent
from nodepool.image.make import ImageResult
from nodepool.loops.launcher import Kit
from nodepool.loops.running import InlineExecutor, run_until
from nodepool.metrics import NoMetrics
from nodepool.model import Build, Machine, Node, NodeState, Request, Wanted
from nodepool.service import nodes, requests
from nodepool.service.agents import Desk
from nodepool.service.requests import Wish
from nodepool.store import open_store
from nodepool.store import tables as t

YAML = """
version: 1
diskimages: [{name: debian, release: bookworm, elements: [debian-minimal]}]
labels: [{name: small, min-ready: %(min_ready)s, max-ready-age: %(max_ready_age)s}]
providers:
  - name: lab
    driver: fake
    count: %(machines)s
    delay: %(delay)s
    failures: %(failures)s
    pools:
      - name: main
        max-servers: %(max_servers)s
        labels: [{name: small, diskimage: debian}]
"""


def yaml_of(*, machines=3, min_ready=1, max_servers=3, delay=1, failures=None, max_ready_age=0):
    return YAML % {
        "machines": machines,
        "min_ready": min_ready,
        "max_servers": max_servers,
        "delay": delay,
        "failures": failures or {},
        "max_ready_age": max_ready_age,
    }


@functools.cache
def migrated():
    """An empty database with its tables, made once: a story is told in less time than the migrations take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.db"
        open_store(f"sqlite:///{path}", VirtualClock()).close()
        return path.read_bytes()


class Story:
    """A daemon that lives, is killed, and lives again on the same store, beside machines that never notice."""

    def __init__(self, folder, yaml=None, **kinds):
        self.folder = folder
        self.clock = VirtualClock()
        self.path = folder / "nodepool.yaml"
        self.broken_images = set()
        self.image_size = 5
        self.write(yaml or yaml_of(**kinds))
        self.world = None
        self.start()

    def write(self, yaml):
        own = "" if "images-dir" in yaml else f"images-dir: {self.folder}/images\n"  # never those of where tests run
        self.path.write_text(own + textwrap.dedent(yaml))

    def start(self):
        database = self.folder / "nodepool.db"
        if not database.exists():
            database.write_bytes(migrated())
        self.store = open_store(f"sqlite:///{database}", self.clock, migrate=False)
        self.current = Current(load(self.path))
        self.referee = LocalReferee(self.store, file_lock(self.folder / "lock"))
        office = self.referee.take_office()
        self.desk = Desk(self.store, self.current)
        if self.world is None:
            self.world = fake.World(self.desk, self.clock)
        self.world.meet(self.desk)
        self.world.configure(self.current().config)
        ports = Ports(self.world, self.world, "ssh-ed25519 AAAAnodepool nodepool")
        kit = Kit(fake.JOBS, fake.entry, lambda _provider: ports, blocking=False)
        self.kits = {"fake": kit}
        parts = Parts(self.kits, self.make, InlineExecutor(), InlineExecutor(), NoMetrics())
        self.daemon = Daemon(self.store, self.current, parts, {"world": self.world})
        self.daemon.take_office(office)
        self.written = False
        self.store.wake.append(lambda: setattr(self, "written", True))

    def make(self, recipe, build_id, _config, progress, _cancelled):
        progress("root.d", 0.1)
        if recipe.name in self.broken_images:
            raise Permanent("debootstrap: no such suite", Code.IMAGE_BUILD)
        path = self.folder / f"{build_id}.raw"
        path.write_bytes(b"image")
        return ImageResult(
            {"raw": path}, self.image_size, hashlib.sha256(b"image").hexdigest(), 1.0, self.folder / "log"
        )

    def die(self):
        """As kill -9 does it: nothing is tidied up; the lock goes with the process, the machines go on."""
        self.referee.leave()
        self.store.close()

    def restart(self):
        self.die()
        self.start()

    def reload(self, yaml, secure=None):
        self.write(yaml)
        self.current.put(load(self.path, secure))
        self.world.configure(self.current().config)

    def run(self, done=None, limit=3600):
        """Let time pass until `done` says so; True when it did within `limit` seconds."""
        return run_until(
            list(self.daemon.loops.values()), self.clock, done or (lambda: False), limit, settled=self.settled
        )

    def settled(self):
        """Whether nothing was written since the last time this was asked."""
        settled, self.written = not self.written, False
        return settled

    def all(self, cls, *where):
        return self.store.read(lambda tx: tx.select(cls, *where))

    def nodes(self, *states):
        wanted = [str(NodeState(state)) for state in states]
        return self.all(Node, *([t.nodes.c.state.in_(wanted)] if wanted else []))

    def machine(self, name):
        return self.all(Machine, t.machines.c.name == name)[0]

    def states(self):
        return {machine.name: str(machine.state) for machine in self.all(Machine)}

    def ready(self, count):
        return lambda: len([n for n in self.nodes("ready") if n.request_id is None]) == count

    def request(self, count=1, **more):
        wish = Wish((Wanted("small", count),), **more)
        return self.store.write(lambda tx: requests.create(tx, self.current(), wish)).id

    def state_of(self, request_id):
        return str(self.store.read(lambda tx: tx.get(Request, request_id)).state)

    def nodes_of(self, request_id):
        return self.store.read(lambda tx: requests.nodes_of(tx, request_id))

    def release(self, request_id):
        self.store.write(lambda tx: requests.release(tx, request_id, "tester"))

    def delete(self, node_id):
        self.store.write(lambda tx: nodes.delete(tx, node_id, "tester"))

    def builds(self, *states):
        return [build for build in self.all(Build) if not states or str(build.state) in states]
