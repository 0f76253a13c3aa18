"""What every power back-end promises, over the rack's BMCs: one suite, run once per back-end."""

from __future__ import annotations

import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nodepool.drivers.power import (
    Auth,
    Bmc,
    Busy,
    OutcomeUnknown,
    Refused,
    Suite,
    Unreachable,
    open_power,
    same_system,
)
from nodepool.errors import Code, Permanent, Temporary
from nodepool.rack.bmc import Endpoint, Faults, User, running

SCHEMES = ["ipmi"]
USERS = {"admin": User("admin"), "operator": User("operator", role=3), "viewer": User("viewer", role=2)}


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture
def endpoint():
    with running(1, users=USERS) as endpoints:
        yield endpoints[0]


@pytest.fixture
def power(endpoint):  # closed before its BMC is
    with open_power() as opened:
        yield opened


@pytest.fixture
def bmc(scheme, endpoint):
    return at(endpoint, scheme)


def at(endpoint: Endpoint, scheme: str = "ipmi", username: str = "admin", password: str = "admin") -> Bmc:
    return Bmc(f"{scheme}://{endpoint.host}:{endpoint.port}", username, password)


def lose_answers_to_commands(endpoint: Endpoint) -> None:
    """From its next power command on, the BMC carries out and does not answer."""
    carry_out = endpoint.bmc.chassis.control

    async def control(action, lag=0.0):
        endpoint.bmc.faults = Faults(silent="answer")
        return await carry_out(action, lag)

    endpoint.bmc.chassis.control = control


# ---- what it is for ----


@pytest.mark.parametrize("suites", [(3,), (17,), (3, 17)])
def test_power_is_switched_and_read_on_each_cipher_suite(power, bmc, endpoint, suites):
    endpoint.bmc.faults = Faults(suites=suites)
    assert power.power(bmc) is False
    power.set_power(bmc, on=True)
    assert power.power(bmc) is True
    assert endpoint.machine.is_on()
    power.set_power(bmc, on=False)
    assert power.power(bmc) is False
    assert list(endpoint.bmc.actions) == ["on", "off"]


@pytest.mark.parametrize("on", [True, False])
def test_asking_for_the_power_that_there_is_already_is_fine(power, bmc, endpoint, on):
    if on:
        power.set_power(bmc, on=True)
    power.set_power(bmc, on=on)
    assert power.power(bmc) is on


def test_a_bmc_that_refuses_the_power_that_there_is_already_is_fine_too(power, bmc, endpoint):
    endpoint.bmc.faults = Faults(refuse={"control": 0xD5})
    power.set_power(bmc, on=False)
    assert power.power(bmc) is False


@pytest.mark.parametrize("device", ["pxe", "disk"])
@pytest.mark.parametrize("uefi", [False, True])
def test_the_next_boot_goes_where_it_was_told(power, bmc, endpoint, device, uefi):
    power.set_boot(bmc, device, uefi=uefi)
    assert endpoint.bmc.chassis.flags().uefi is uefi
    power.set_power(bmc, on=True)
    assert endpoint.machine.boots == [(device, True)]


def test_a_persistent_boot_device_is_for_all_boots(power, bmc, endpoint):
    power.set_boot(bmc, "pxe", uefi=False, persistent=True)
    for on in (True, False, True):
        power.set_power(bmc, on=on)
    assert endpoint.machine.boots == [("pxe", False), ("pxe", False)]


def test_boot_flags_are_told_to_outlast_a_long_self_test(power, bmc, endpoint):
    power.set_boot(bmc, "pxe", uefi=False)
    assert endpoint.bmc.chassis.options[3][-1] & 0x08


def test_info_tells_what_kind_of_bmc_it_is_and_whose(power, bmc, endpoint):
    info = power.info(bmc)
    assert info["ipmi"] == "2.0"
    assert info["firmware"] == "1.00"
    assert info["manufacturer"] == str(0x0FFFFF)
    assert (info["suite"], info["privilege"], info["available"]) == ("17", "administrator", "yes")
    assert same_system(info["guid"], str(endpoint.bmc.uuid))


def test_info_goes_without_the_guid_when_the_bmc_has_none(power, bmc, endpoint):
    endpoint.bmc.faults = Faults(refuse={"guid": 0xC1})
    assert "guid" not in power.info(bmc)


def test_identify_blinks_the_light(power, bmc, endpoint):
    power.identify(bmc, 60)
    assert endpoint.bmc.chassis.identify_until > time.monotonic() + 50


@pytest.mark.skipif(shutil.which("ipmitool") is None, reason="ipmitool is not installed")
@pytest.mark.parametrize("suite", [3, 17])
def test_ipmitool_sees_the_same_power(power, bmc, endpoint, suite):
    where = ["-H", endpoint.host, "-p", str(endpoint.port), "-U", "admin", "-P", "admin", "-C", str(suite)]

    def ipmitool(*words: str) -> str:
        command = ["ipmitool", "-I", "lanplus", *where, "chassis", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

    power.set_power(bmc, on=True)
    assert "is on" in ipmitool("power", "status")
    ipmitool("power", "off")
    assert power.power(bmc) is False
    power.set_boot(bmc, "pxe", uefi=True)
    flags = ipmitool("bootparam", "get", "5")
    assert "Boot Flag Valid" in flags
    assert "Force PXE" in flags


# ---- credentials ----


@pytest.mark.parametrize("tag0", [False, True])
@pytest.mark.parametrize(("username", "password"), [("admin", "wrong"), ("nobody", "admin"), ("viewer", "viewer")])
def test_credentials_that_do_not_fit_are_named_at_once(power, scheme, endpoint, tag0, username, password):
    endpoint.bmc.faults = Faults(tag0=tag0)
    began = time.monotonic()
    with pytest.raises(
        Auth, match=rf'{endpoint.host}:{endpoint.port} refused user "{username}".*secure.yaml'
    ) as caught:
        power.power(at(endpoint, scheme, username, password))
    assert caught.value.code is Code.BMC_AUTH
    assert time.monotonic() - began < 2


def test_an_operator_can_do_all_that_nodepool_does(power, scheme, endpoint):
    bmc = at(endpoint, scheme, "operator", "operator")
    power.set_boot(bmc, "pxe", uefi=False)
    power.set_power(bmc, on=True)
    power.identify(bmc, 5)
    assert power.info(bmc)["privilege"] == "operator"
    assert power.power(bmc) is True


def test_a_password_of_20_bytes_works(power, scheme):
    with running(1, users={"admin": User("p" * 20)}) as (endpoint,):
        assert power.power(at(endpoint, scheme, password="p" * 20)) is False


@pytest.mark.parametrize(("username", "password"), [("u" * 17, "x"), ("admin", "p" * 21)])
def test_credentials_longer_than_ipmi_allows_are_refused_before_anything_is_sent(
    power, scheme, endpoint, username, password
):
    with pytest.raises(Permanent, match="IPMI allows") as caught:
        power.power(at(endpoint, scheme, username, password))
    assert caught.value.code is Code.CONFIG
    assert not endpoint.bmc.received


def test_the_password_is_not_in_the_record_s_text():
    assert "hidden" not in repr(Bmc("ipmi://127.0.0.11", "admin", "hidden"))


# ---- BMCs as they are ----


@pytest.mark.parametrize("stage", ["open", "rakp1", "rakp3", "setpriv", "cmd", "all"])
def test_a_bmc_that_falls_silent_costs_no_more_than_the_deadline(power, bmc, endpoint, stage):
    endpoint.bmc.faults = Faults(silent=stage)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=f"BMC {endpoint.host}:{endpoint.port} did not answer .* check") as caught:
        power.power(bmc, deadline=0.7)
    assert 0.6 < time.monotonic() - began < 1.2
    assert caught.value.code is Code.BMC_UNREACHABLE


def test_an_address_where_nothing_listens_costs_no_more_than_the_deadline(power, scheme):
    began = time.monotonic()
    with pytest.raises(Unreachable):
        power.power(Bmc(f"{scheme}://127.0.0.10:9", "admin", "admin"), deadline=0.5)
    assert time.monotonic() - began < 1


def test_a_command_that_was_carried_out_and_not_answered_is_of_unknown_outcome(power, bmc, endpoint):
    lose_answers_to_commands(endpoint)
    with pytest.raises(OutcomeUnknown, match="may have carried out: read the state first") as caught:
        power.set_power(bmc, on=True, deadline=1.5)
    assert caught.value.code is Code.BMC_UNKNOWN_OUTCOME
    assert list(endpoint.bmc.actions) == ["on"]  # once, however often it was sent


def test_a_command_that_never_began_is_not_of_unknown_outcome(power, bmc, endpoint):
    endpoint.bmc.faults = Faults(silent="cmd")
    with pytest.raises(Unreachable):
        power.set_power(bmc, on=True, deadline=0.6)
    assert not endpoint.bmc.actions


def test_a_bmc_without_a_free_session_is_busy(power, bmc, endpoint):
    endpoint.bmc.faults = Faults(full=True)
    with pytest.raises(Busy, match="no free session") as caught:
        power.power(bmc)
    assert isinstance(caught.value, Temporary)


def test_a_bmc_that_keeps_saying_busy_is_busy_when_the_deadline_is_over(power, bmc, endpoint):
    endpoint.bmc.faults = Faults(refuse={"status": 0xC0})
    with pytest.raises(Busy, match="0xc0"):
        power.power(bmc, deadline=0.5)


def test_a_bmc_without_a_suite_of_ours_is_told_apart(power, bmc, endpoint):
    endpoint.bmc.faults = Faults(suites=())
    with pytest.raises(Suite, match="cipher suite"):
        power.power(bmc)


def test_a_refusal_keeps_its_completion_code(power, bmc, endpoint):
    endpoint.bmc.faults = Faults(refuse={"control": 0xC1})
    with pytest.raises(Refused, match="refused the power command with completion code 0xc1") as caught:
        power.set_power(bmc, on=True)
    assert caught.value.completion == 0xC1


def test_power_that_lags_is_told_as_the_bmc_sees_it(power, bmc, endpoint):
    endpoint.bmc.faults = Faults(lag=0.3)
    power.set_power(bmc, on=True)
    assert power.power(bmc) is False  # taken, and not seen yet
    until = time.monotonic() + 5
    while not power.power(bmc):
        assert time.monotonic() < until
    assert list(endpoint.bmc.actions) == ["on"]


def test_lost_and_repeated_packets_are_got_over(power, scheme):
    with running(8, faults=Faults(drop=0.1, duplicate=0.2)) as endpoints, ThreadPoolExecutor(8) as threads:

        def use(endpoint):
            power.set_power(at(endpoint, scheme), on=True, deadline=30)
            return power.power(at(endpoint, scheme), deadline=30)

        assert all(threads.map(use, endpoints))
        assert all(list(endpoint.bmc.actions) == ["on"] for endpoint in endpoints)


# ---- many at once ----


def test_64_bmcs_are_asked_at_once_from_threads(power, scheme):
    with running(64) as endpoints, ThreadPoolExecutor(64) as threads:
        bmcs = [at(endpoint, scheme) for endpoint in endpoints]
        list(threads.map(lambda bmc: power.set_power(bmc, on=True), bmcs[::2]))
        states = list(threads.map(power.power, bmcs))
    assert states == [True, False] * 32


def test_the_dead_among_many_cost_the_others_nothing(power, scheme):
    with running(16) as endpoints, ThreadPoolExecutor(16) as threads:
        for endpoint in endpoints[:4]:
            endpoint.bmc.faults = Faults(silent="all")
        began = time.monotonic()
        dead = [threads.submit(power.power, at(endpoint, scheme), deadline=3) for endpoint in endpoints[:4]]
        live = [threads.submit(power.power, at(endpoint, scheme)) for endpoint in endpoints[4:]]
        assert not any(future.result() for future in live)
        assert time.monotonic() - began < 1.5
        assert all(isinstance(future.exception(), Unreachable) for future in dead)


# ---- addresses ----


@pytest.mark.parametrize("address", ["telnet://127.0.0.11", "127.0.0.11", "redfish://127.0.0.11"])
def test_an_address_of_no_known_kind_names_the_kinds_that_there_are(power, address):
    with pytest.raises(Permanent, match=r'"(.*)" is of no known kind.*ipmi://') as caught:
        power.power(Bmc(address))
    assert address in str(caught.value)
    assert caught.value.code is Code.CONFIG


@pytest.mark.parametrize(
    "address", ["ipmi://", "ipmi://:623", "ipmi://h:0", "ipmi://h:99999", "ipmi://u:p@h", "ipmi://h/x", "ipmi://[::1"]
)
def test_a_malformed_address_is_named(power, address):
    with pytest.raises(Permanent, match="form ipmi://HOST"):
        power.power(Bmc(address))


def test_a_closed_power_refuses_and_closes_twice():
    power = open_power()
    power.close()
    power.close()
    with pytest.raises(Temporary, match="closed"):
        power.power(Bmc("ipmi://127.0.0.11"))


@pytest.mark.parametrize(
    ("guid", "same"),
    [
        ("ffeeddccbbaa99887766554433221100", True),  # IPMI 2.0
        ("00112233445566778899aabbccddeeff", True),  # RFC 4122
        ("33221100554477668899aabbccddeeff", True),  # SMBIOS
        ("00112233445566778899aabbccddeef0", False),
        ("", False),
    ],
)
def test_a_guid_is_recognised_in_each_byte_order(guid, same):
    assert same_system(guid, "00112233-4455-6677-8899-AABBCCDDEEFF") is same
