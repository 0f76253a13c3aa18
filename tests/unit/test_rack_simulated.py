"""Simulated machines: what can be told of them before there is one."""

import json

import pytest

from nodepool.config import load
from nodepool.rack import RackError, phases
from nodepool.rack.faults import NO_FAULTS
from nodepool.rack.simulated import rack as simulated


def described(tmp_path, count=300):
    return simulated.describe(tmp_path, count, phases.told(["all=0.1"]))


def test_seconds_are_told_for_one_phase_or_for_all():
    told = phases.told(["all=2,write=10", "firmware=0.5"])
    assert told == {**dict.fromkeys(phases.DEFAULT, 2.0), "write": 10.0, "firmware": 0.5}


@pytest.mark.parametrize("text", ["flying=1", "write", "write=-1", "write=nan", "write=soon", "write=1e9"])
def test_seconds_that_cannot_be_are_refused_with_what_can(text):
    with pytest.raises(RackError, match=r"the phases are|give seconds"):
        phases.told([text])


def test_a_fault_names_phases_and_says_which_there_are():
    faults = NO_FAULTS.with_fault("fail=erase,write")
    assert (faults.fail, faults.ails_machine, faults.described()) == (("erase", "write"), True, ["fail=erase,write"])
    assert not NO_FAULTS.with_fault("stuck").ails_machine
    with pytest.raises(RackError, match="firmware, ramdisk"):
        NO_FAULTS.with_fault("hang=flying")


def test_every_machine_has_addresses_of_its_own(tmp_path):
    rack = described(tmp_path, 1000)
    for key in ("name", "mac", "ip", "uuid"):
        assert len({machine[key] for machine in rack["machines"]}) == 1000
    assert rack["gateway"] not in {machine["ip"] for machine in rack["machines"]}


@pytest.mark.parametrize("count", [0, 5001])
def test_a_rack_has_its_bounds(tmp_path, count):
    with pytest.raises(RackError, match="1 to 5000"):
        described(tmp_path, count)


def test_the_yaml_is_one_that_the_daemon_takes(tmp_path):
    path = simulated.write_yaml(described(tmp_path), tmp_path / "home", "tools/fake-image-create", 7)
    secrets = path.with_name("secure.yaml")
    config = load(path, secrets)
    assert len(config.providers["simulated"].machines) == 300
    assert config.labels[simulated.LABEL].min_ready == 7
    assert secrets.stat().st_mode & 0o077 == 0


def test_racks_of_other_seconds_or_of_real_machines_are_not_alike(tmp_path):
    one = described(tmp_path, 3)
    assert simulated.alike(one, json.loads(json.dumps(described(tmp_path, 3))))
    assert not simulated.alike(one, {**one, "seconds": phases.told([])})
    assert not simulated.alike({"machines": []}, one)
