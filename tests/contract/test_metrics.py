"""Metrics on the wire: a real UDP socket on the far side, upstream's names."""

import socket
from collections import Counter
from dataclasses import replace

import pytest

from nodepool import model as m
from nodepool.metrics import StatsdMetrics

NODE = m.Node(1, "small", "rack1", "main", 1, "r1n1", "debian.12", "b", "g", m.NodeState.READY, 9, 1_000_000)


@pytest.fixture
def listener():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(5)
        yield udp


def lines(udp):
    return sorted(udp.recv(4096).decode().splitlines())


@pytest.fixture
def metrics():
    made = []

    def to(udp, prefix="nodepool"):
        made.append(StatsdMetrics("127.0.0.1", udp.getsockname()[1], prefix))
        return made[-1]

    yield to
    for one in made:
        one.close()


def test_a_launch_that_came_to_ready_is_a_timer_and_a_counter_by_result_provider_and_image(listener, metrics):
    metrics(listener).launch(replace(NODE, ready_at=31_500_000))
    assert lines(listener) == [
        "nodepool.launch.image.debian_12.ready:1|c",
        "nodepool.launch.image.debian_12.ready:30500.000000|ms",
        "nodepool.launch.provider.rack1.ready:1|c",
        "nodepool.launch.provider.rack1.ready:30500.000000|ms",
        "nodepool.launch.ready:1|c",
        "nodepool.launch.ready:30500.000000|ms",
    ]


def test_a_launch_that_failed_is_counted_under_its_code(listener, metrics):
    failed = replace(NODE, state=m.NodeState.FAILED, failed_at=2_000_000, failure_code="disk-write")
    metrics(listener).launch(failed)
    assert "nodepool.launch.error.disk-write:1|c" in lines(listener)


def test_nodes_are_gauges_by_state_label_and_provider_and_a_gauge_that_is_down_to_nothing_is_told(listener, metrics):
    told = metrics(listener, prefix="lab.pool")
    told.nodes(Counter({("rack1", "main", "small", m.NodeState.READY): 2}), [("rack1", 5), ("rack1", 3)])
    assert lines(listener) == [
        "lab.pool.label.small.nodes.ready:2|g",
        "lab.pool.nodes.ready:2|g",
        "lab.pool.provider.rack1.max_servers:8|g",
        "lab.pool.provider.rack1.nodes.ready:2|g",
    ]
    told.nodes(Counter(), [("rack1", 8)])
    assert "lab.pool.nodes.ready:0|g" in lines(listener)


def test_a_build_tells_its_size_its_duration_and_its_outcome(listener, metrics):
    told = metrics(listener)
    told.build("debian", 12.5, 1000, good=True)
    assert lines(listener) == [
        "nodepool.dib_image_build.debian.raw.size:1000|g",
        "nodepool.dib_image_build.debian.status.duration:12500.000000|ms",
        "nodepool.dib_image_build.debian.status.rc:0|g",
    ]
    told.build("debian", 0, 0, good=False)
    assert "nodepool.dib_image_build.debian.status.rc:1|g" in lines(listener)


def test_a_statsd_that_is_not_there_is_no_error():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        port = udp.getsockname()[1]
    told = StatsdMetrics("127.0.0.1", port, "nodepool")
    for _ in range(3):
        told.launch(replace(NODE, ready_at=2_000_000))
    assert told.gauges_every > 0
    told.close()
