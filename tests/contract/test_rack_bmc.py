"""The rack's BMC is a BMC to the tools that people use: ipmitool and freeipmi's ipmipower, both written by others."""

import asyncio
import random
import re
import socket
import subprocess
from pathlib import Path

import pytest

from nodepool.rack import RackError, bmc, wire
from nodepool.rack.bmc import Bmc, Faults, MemoryMachine, User
from nodepool.rack.chassis import FLAGS_SECONDS
from nodepool.rack.session import Session

USERS = {"admin": User("s3cret-of-admin", 4), "oper": User("s3cret-of-oper", 3)}

both_suites = pytest.mark.parametrize("suite", ["3", "17"])


def ipmitool(endpoint, *words, user="admin", password=None, suite="17", options=()):
    """Run ipmitool with one attempt of one second per packet."""
    account = ["-U", user, "-P", password or USERS[user].password, "-C", suite, "-R", "1", "-N", "1"]
    place = ["ipmitool", "-I", "lanplus", "-H", endpoint.host, "-p", str(endpoint.port)]
    return subprocess.run([*place, *account, *options, *words], capture_output=True, text=True, timeout=60, check=False)


def ipmipower(endpoints, *words, suite="17", patience=(5000, 400)):
    """Run freeipmi's ipmipower on all endpoints at once; what it says per host.  Patience in ms: session, packet."""
    hosts = ",".join(f"{endpoint.host}:{endpoint.port}" for endpoint in endpoints)
    account = ["-u", "admin", "-p", USERS["admin"].password, "-D", "LAN_2_0", "-I", suite]
    waits = ["--session-timeout", str(patience[0]), "--retransmission-timeout", str(patience[1])]
    done = subprocess.run(
        ["ipmipower", "-h", hosts, *account, *waits, *words], capture_output=True, text=True, timeout=60, check=False
    )
    return dict(re.findall(r"^([\d.]+): (.*)$", done.stdout, re.MULTILINE))


@pytest.fixture
def one():
    with bmc.running(users=USERS) as endpoints:
        yield endpoints[0]


@both_suites
def test_ipmitool_switches_power_and_reads_it_back(one, suite):
    assert "is off" in ipmitool(one, "power", "status", suite=suite).stdout
    assert ipmitool(one, "power", "on", suite=suite).returncode == 0
    assert one.machine.is_on()
    assert "is on" in ipmitool(one, "power", "status", suite=suite).stdout
    assert ipmitool(one, "power", "off", suite=suite).returncode == 0
    assert not one.machine.is_on()


@both_suites
def test_ipmipower_agrees_with_ipmitool(suite):
    with bmc.running(3, users=USERS) as endpoints:
        ipmitool(endpoints[1], "power", "on", suite=suite)
        answers = ipmipower(endpoints, "--stat", suite=suite)
    assert [answers[endpoint.host] for endpoint in endpoints] == ["off", "on", "off"]


@both_suites
def test_ipmipower_switches_many_at_once(suite):
    with bmc.running(16, users=USERS) as endpoints:
        answers = ipmipower(endpoints, "--on", suite=suite)
        assert set(answers.values()) == {"ok"}
        assert all(endpoint.machine.is_on() for endpoint in endpoints)


def test_one_shot_pxe_is_used_up_by_the_next_power_on(one):
    ipmitool(one, "chassis", "bootdev", "pxe")
    ipmitool(one, "power", "on")
    ipmitool(one, "power", "cycle")
    assert one.machine.boots == [("pxe", True), (None, True)]


def test_persistent_device_stays(one):
    ipmitool(one, "chassis", "bootdev", "disk", "options=persistent")
    ipmitool(one, "power", "on")
    ipmitool(one, "power", "cycle")
    assert one.machine.boots == [("disk", False), ("disk", False)]


def test_reset_boots_by_the_flags_without_a_power_off(one):
    ipmitool(one, "power", "on")
    ipmitool(one, "chassis", "bootdev", "pxe")
    assert ipmitool(one, "power", "reset").returncode == 0
    assert one.machine.boots == [(None, True), ("pxe", True)]


def test_uefi_bit_is_kept_with_the_flags(one):
    ipmitool(one, "chassis", "bootdev", "pxe", "options=efiboot")
    assert str(one.bmc.chassis.flags()) == "pxe once (uefi)"
    assert "EFI boot" in ipmitool(one, "chassis", "bootparam", "get", "5").stdout


def test_cycle_of_a_machine_that_is_off_is_refused(one):
    assert "not supported in present state" in ipmitool(one, "power", "cycle").stderr


def test_boot_flags_that_nobody_used_expire():
    time = [0.0]
    machine = Bmc(MemoryMachine(), USERS, now=lambda: time[0])
    machine.chassis.set_options(bytes((5, 0x80, 0x04, 0, 0, 0)))
    assert str(machine.chassis.flags()) == "pxe once"
    time[0] += FLAGS_SECONDS + 1
    assert str(machine.chassis.flags()) == "default"


def test_parameter_3_keeps_the_flags_from_expiring():
    time = [0.0]
    machine = Bmc(MemoryMachine(), USERS, now=lambda: time[0])
    machine.chassis.set_options(bytes((3, 0x08)))
    machine.chassis.set_options(bytes((5, 0x80, 0x04, 0, 0, 0)))
    time[0] += FLAGS_SECONDS + 1
    assert str(machine.chassis.flags()) == "pxe once"


def test_guid_is_the_uuid_of_the_machine(one):
    assert str(one.bmc.uuid) in ipmitool(one, "mc", "guid").stdout


def test_identify_is_taken_and_ends_by_itself(one):
    assert ipmitool(one, "chassis", "identify", "5").returncode == 0
    assert 0 < one.bmc.chassis.identify_until - one.bmc.now() <= 5


@both_suites
def test_wrong_password_opens_no_session(one, suite):
    done = ipmitool(one, "power", "on", password="not-it", suite=suite)
    assert done.returncode != 0
    assert one.bmc.received["control"] == 0


@both_suites
def test_unknown_user_opens_no_session(one, suite):
    done = ipmitool(one, "power", "status", user="nobody", password="x", suite=suite)
    assert done.returncode != 0
    assert one.bmc.received["rakp3"] == 0


def test_operator_may_switch_power_as_operator(one):
    assert ipmitool(one, "power", "on", user="oper", options=("-L", "OPERATOR")).returncode == 0
    assert one.machine.is_on()


def test_operator_cannot_open_an_administrators_session(one):
    assert ipmitool(one, "power", "on", user="oper").returncode != 0
    assert not one.machine.is_on()


def test_session_at_user_privilege_may_look_and_not_touch(one):
    options = ("-L", "USER")
    assert "is off" in ipmitool(one, "power", "status", options=options).stdout
    assert "Insufficient privilege" in ipmitool(one, "power", "on", options=options).stderr


def test_bmc_key_is_needed_where_there_is_one(one):
    one.bmc.sessions.kg = b"the-key-of-the-bmc"
    assert ipmitool(one, "power", "status").returncode != 0
    assert ipmitool(one, "power", "status", options=("-k", "the-key-of-the-bmc")).returncode == 0


def test_closed_sessions_give_their_slots_back():
    with bmc.running(users=USERS, slots=1) as endpoints:
        for _ in range(3):
            assert ipmitool(endpoints[0], "power", "status").returncode == 0
        assert endpoints[0].bmc.open_sessions == 0


def test_idle_sessions_lose_their_slots():
    time = [0.0]
    machine = Bmc(MemoryMachine(), USERS, slots=1, now=lambda: time[0])
    request = bytes((1, 0, 0, 0)) + b"con1" + bytes.fromhex("0000000803000000 0100000804000000 0200000801000000")
    assert machine.sessions.open(request, (17,), full=False)[1] == 0
    assert machine.sessions.open(request, (17,), full=False)[1] == 1
    time[0] += 6
    assert machine.sessions.open(request, (17,), full=False)[1] == 0


# Faults


@pytest.mark.parametrize("stage", ["open", "rakp1", "rakp3", "setpriv", "cmd", "answer", "all"])
def test_silent_at_a_stage_is_a_timeout_to_the_console(one, stage):
    one.bmc.faults = Faults(silent=stage)
    assert "timeout" in ipmipower([one], "--stat", patience=(600, 100))[one.host]
    one.bmc.faults = Faults()
    assert ipmipower([one], "--stat")[one.host] == "off"


def test_lost_answer_means_that_the_command_was_carried_out(one):
    one.bmc.faults = Faults(silent="answer")
    assert "timeout" in ipmipower([one], "--on", patience=(1000, 100))[one.host]
    assert one.machine.boots == [(None, True)]


def test_retry_of_a_cycle_gets_its_answer_and_no_second_cycle():
    """A retry has the message's sequence number again; freeipmi and ipmitool number each attempt anew."""

    async def cycle_twice():
        machine, answers = Bmc(MemoryMachine(is_on=True), USERS), []
        session = Session(b"con1", b"bmc1", wire.SUITES[17], machine.now(), privilege=3)
        session.keys = wire.Keys.derive(session.suite, b"key")
        machine.sessions.table[session.managed] = session
        message = wire.Message(0x20, 0, 0x81, 0, 5, 0, 2, b"\x02")
        for _ in range(2):
            machine._in_session(session, message, answers.append)
            await machine.close()
        return list(machine.actions), len(answers)

    assert asyncio.run(cycle_twice()) == (["cycle"], 2)


def test_no_free_session(one):
    one.bmc.faults = Faults(full=True)
    assert "insufficient resources" in ipmitool(one, "power", "status", options=("-v",)).stderr.lower()


@pytest.mark.parametrize(("offered", "accepted"), [("3", 17), ("17", 3)])
def test_only_one_suite_is_accepted(one, offered, accepted):
    one.bmc.faults = Faults(suites=(accepted,))
    assert ipmitool(one, "power", "status", suite=offered).returncode != 0
    assert ipmitool(one, "power", "status", suite=str(accepted)).returncode == 0


def test_failed_login_may_be_answered_as_openbmc_does(one):
    one.bmc.faults = Faults(tag0=True)
    assert ipmitool(one, "power", "status", user="nobody", password="x").returncode != 0
    assert ipmitool(one, "power", "status").returncode == 0


def test_status_lags_behind_the_power(one):
    one.bmc.faults = Faults(lag=60)
    ipmitool(one, "power", "on")
    assert one.machine.is_on()
    assert "is off" in ipmitool(one, "power", "status").stdout


def test_stuck_power_is_accepted_and_does_not_change(one):
    one.bmc.faults = Faults(stuck=True)
    assert ipmitool(one, "power", "on").returncode == 0
    assert not one.machine.is_on()


def test_command_is_refused_with_a_code(one):
    one.bmc.faults = Faults(refuse={"control": 0xC0})
    assert "Node busy" in ipmitool(one, "power", "on").stderr
    assert not one.machine.is_on()


def test_console_that_repeats_itself_gets_through_losses_and_duplicates(one):
    random.seed(2)
    one.bmc.faults = Faults(drop=0.2, duplicate=0.3)
    assert ipmipower([one], "--on", patience=(10000, 60))[one.host] == "ok"
    assert one.machine.boots == [(None, True)]


@pytest.mark.parametrize(
    "text", ["silent=never", "suites=4", "lag=-1", "drop=2", "refuse=control", "stuck=perhaps", "explode"]
)
def test_unknown_fault_says_what_is_allowed(text):
    with pytest.raises(RackError, match=r"give |the faults are "):
        Faults().with_fault(text)


def test_faults_are_written_as_on_the_command_line():
    faults = Faults()
    for text in ("silent=rakp1", "full", "suites=17", "lag=8", "refuse=control:0xc0,status:0xc3", "drop=0.3"):
        faults = faults.with_fault(text)
    expected = Faults("rakp1", full=True, suites=(17,), lag=8, refuse={"control": 0xC0, "status": 0xC3}, drop=0.3)
    assert faults == expected


# What is malformed is ignored


def test_rubbish_is_ignored():
    machine, answers = Bmc(MemoryMachine(), USERS), []
    rng = random.Random(1)
    for _ in range(5000):
        head = rng.choice([b"", wire.RMCP_IPMI, wire.RMCP_IPMI + b"\x06", wire.RMCP_IPMI + b"\x00", wire.RMCP_ASF])
        machine.receive(head + rng.randbytes(rng.randrange(90)), answers.append)
    assert machine.open_sessions == 0


def test_altered_packets_of_a_real_login_are_ignored(one):
    recorded = []

    def receive(datagram, send):
        recorded.append(datagram)
        Bmc.receive(one.bmc, datagram, send)

    one.bmc.receive = receive
    ipmitool(one, "power", "on")
    one.bmc.forget_sessions()
    rng = random.Random(3)
    machine = Bmc(MemoryMachine(), USERS)
    for datagram in recorded * 200:
        altered = bytearray(datagram)
        for _ in range(rng.randrange(1, 4)):
            altered[rng.randrange(len(altered))] = rng.randrange(256)
        machine.receive(bytes(altered[: rng.randrange(len(altered)) + 1]), lambda _answer: None)
        machine.receive(bytes(altered), lambda _answer: None)
    assert not machine.machine.is_on()


def test_packet_of_a_session_is_answered_once_however_often_it_arrives(one):
    answers_to_copies = []

    def receive(datagram, send):
        Bmc.receive(one.bmc, datagram, send)
        if datagram[4:6] == b"\x06\xc0":  # RMCP+, encrypted and authenticated
            Bmc.receive(one.bmc, datagram, answers_to_copies.append)

    one.bmc.receive = receive
    assert ipmitool(one, "power", "status").returncode == 0
    assert one.bmc.received["malformed"] >= 3
    assert answers_to_copies == []


def test_presence_ping_is_answered(one):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as console:
        console.settimeout(5)
        console.sendto(bytes.fromhex("0600ff06000011be80420000"), (one.host, one.port))
        pong = console.recv(100)
    assert (pong[8], pong[9], pong[20]) == (0x40, 0x42, 0x81)


def test_port_in_use_is_said_in_a_sentence(one):
    async def again():
        await bmc.serve([(Bmc(MemoryMachine(), USERS), one.host, one.port)])

    with pytest.raises(RackError, match=f"{one.host}:{one.port} .*: stop what listens there"):
        asyncio.run(again())


def test_everything_is_closed_at_the_end():
    def descriptors():
        return sorted(path.name for path in Path("/proc/self/fd").iterdir())

    before = descriptors()
    with bmc.running(64, users=USERS):
        assert len(descriptors()) > 64
    assert descriptors() == before
