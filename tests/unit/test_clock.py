"""The only source of time."""

import time

from nodepool.clock import SECOND, SystemClock


def test_the_time_goes_on_when_the_machines_clock_is_set_back(monkeypatch):
    clock, wall = SystemClock(), time.time_ns
    before = clock.now()
    monkeypatch.setattr(time, "time_ns", lambda: wall() - 3600 * 10**9)
    assert 0 <= clock.now() - before < 60 * SECOND


def test_the_time_follows_the_machines_clock_when_it_is_set_forward(monkeypatch):
    clock, wall = SystemClock(), time.time_ns
    before = clock.now()
    monkeypatch.setattr(time, "time_ns", lambda: wall() + 3600 * 10**9)
    assert clock.now() - before >= 3600 * SECOND
