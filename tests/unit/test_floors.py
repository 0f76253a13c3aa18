"""A room imports only from floors below it: the picture in doc/architecture.rst is true because this test says so."""

import ast
from pathlib import Path

import nodepool

ROOT = Path(nodepool.__file__).parent
FLOORS = {
    "errors": 0, "clock": 0, "log": 0,
    "model": 1,
    "lifecycle": 2, "ssh": 2, "metrics": 2, "door": 2, "config": 2,
    "plan": 3, "store": 3, "coord": 3, "image": 3,
    "boot": 4, "drivers": 4, "service": 4,
    "loops": 5, "api": 5,
    "cmd": 6,
}  # fmt: skip
ASIDE = {"rack", "agent", "elements"}
ALLOWED_BESIDE = {("coord", "store")}  # the referee raises the epoch of a row


def rooms():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "nodepool" else [f"nodepool.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("nodepool.") and name != "nodepool.__version__":
                yield name.split(".")[1]


def test_every_room_has_a_floor():
    assert {room for _, room in rooms()} <= FLOORS.keys() | ASIDE


def test_a_room_imports_only_from_floors_below_it():
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path, room in rooms()
        if room in FLOORS
        for other in imported(path)
        if other in FLOORS and other != room and FLOORS[other] >= FLOORS[room] and (room, other) not in ALLOWED_BESIDE
    ]
    assert wrong == []


def test_the_rack_stands_aside():
    wrong = [f"{path.relative_to(ROOT)} imports rack" for path, room in rooms() if room != "rack" and "rack" in
             imported(path) and path.name != "rack.py"]  # fmt: skip
    wrong += [
        f"{path.relative_to(ROOT)} imports {other}"
        for path, room in rooms()
        if room == "rack"
        for other in imported(path)
        if other not in {"errors", "rack", "clock", "log"}
    ]
    assert wrong == []
