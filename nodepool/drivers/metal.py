"""The `metal` driver: machines with a BMC, provisioned over the network by the agent.

Every job that needs the agent begins by switching the machine off until it reads off, minting a boot, and switching it
on; a job that finds an agent already waiting starts behind that (`entry`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from nodepool.clock import micros
from nodepool.drivers.power import same_system
from nodepool.drivers.step import Context, Done, Jobs, Outcome, Step, Wait, firmware_of, model_of
from nodepool.errors import Code, Permanent, Temporary
from nodepool.model import Boot, BootState, Json, MachineState, NodeState, OperationState
from nodepool.plan.board import HAND_OVER
from nodepool.ssh import Target

SILENCE = 15.0  # seconds; an agent at work reports every 5 s
AGENT_PATIENCE = 180.0  # seconds since an agent was last heard within which it counts as waiting for work


def entry(job: str, boot: Boot | None, attempt: int, now: int) -> str:
    """The step at which a job starts: behind the boot when an agent is waiting, at the power switch otherwise."""
    warm = (
        boot is not None
        and boot.state is BootState.UP
        and attempt == 1
        and now - max(boot.seen_at, boot.hello_at) < micros(AGENT_PATIENCE)
    )
    if warm and job == MachineState.CLEANING:
        return "erase"
    if warm and job == NodeState.BUILDING:
        return "write"
    return JOBS[job][0].name


def power_off(ctx: Context) -> Outcome:
    """Off until it reads off; only then may a boot be minted."""
    if not ctx.ports.power.power(ctx.bmc):
        return Done(power="off", mint=True)
    ctx.ports.power.set_power(ctx.bmc, on=False)
    return Wait(ctx.ports.pace, "told to power off; it still reads on", power="on")


def switch_off(ctx: Context) -> Outcome:
    """Off until it reads off; the agent that waited is gone."""
    if not ctx.ports.power.power(ctx.bmc):
        return Done(power="off", end_boot=True)
    ctx.ports.power.set_power(ctx.bmc, on=False)
    return Wait(ctx.ports.pace, "told to power off; it still reads on", power="on")


def power_on(ctx: Context) -> Outcome:
    """On, from the network this once, until it reads on."""
    if ctx.ports.power.power(ctx.bmc):
        return Done(power="on")
    ctx.ports.power.set_boot(ctx.bmc, "pxe", uefi=ctx.spec.firmware == "uefi")
    ctx.ports.power.set_power(ctx.bmc, on=True)
    return Wait(ctx.ports.pace, "told to power on; it still reads off", power="off")


def agent(ctx: Context) -> Outcome:
    """Wait until the agent of this boot has said hello."""
    if ctx.boot is None:
        raise Permanent("the boot that was expected is gone from the store", Code.UNEXPECTED)
    if ctx.boot.state is BootState.UP:
        return Done()
    if ctx.boot.state is BootState.FAILED:
        raise Permanent(ctx.boot.error, Code.BOOT_CONTESTED)
    _still_on(ctx, since=ctx.operation.created_at)
    return Wait(60, "no word from the agent since power-on (firmware self test, PXE, ramdisk)")


def _still_on(ctx: Context, since: int) -> None:
    """Nobody waits for a machine that somebody else has switched off: a power cut, a hand on the button.

    Looked at only when nothing was heard `since` for a while; a BMC that does not answer now says nothing about it.
    """
    if ctx.now - since < micros(SILENCE):
        return
    with contextlib.suppress(Temporary):
        if not ctx.ports.power.power(ctx.bmc):
            raise Permanent("the machine was switched off by somebody else; it is switched on again", Code.POWER_LOST)


def check(ctx: Context) -> Outcome:
    """Look at the facts that the agent has told: there must be a disk to install on."""
    root_disk(ctx)
    return Done()


def identity(ctx: Context) -> Outcome:
    """The machine that the agent runs on is the one behind the BMC, or nothing of it is wiped.

    Compared are the BMC's GUID (IPMI 2.0, 20.8) and the UUID that the firmware tells its system (SMBIOS type 1).
    """
    told = str(ctx.machine.facts.get("fact.uuid", ""))
    if ctx.spec.identity == "unchecked" or not told:
        return Done()
    guid = ctx.ports.power.info(ctx.bmc).get("guid", "")
    if not guid.strip("0") or same_system(guid, told):  # one that tells none proves nothing either way
        return Done()
    raise Permanent(
        f"the agent runs on a system with UUID {told}, and the BMC {ctx.bmc.address} belongs to another (GUID {guid}):"
        " an address in the YAML or a cable is wrong; where the BMC makes its GUID up, set identity: unchecked",
        Code.IDENTITY,
    )


def root_disk(ctx: Context) -> tuple[str, int]:
    """The kernel's name and the bytes of the disk that the hints choose, from the facts of the last hello."""
    hint, seen = ctx.spec.root_device, []
    for disk in disks(ctx.machine.facts):
        name, size = disk["name"], int(disk.get("size") or 0)
        seen.append(f"{name} ({gigabytes(size)}, serial {disk.get('serial') or 'none'})")
        wanted = ((hint.serial, "serial"), (hint.wwn, "wwn"), (hint.name, "name"))
        if size >= hint.min_size and all(not value or value == disk.get(key) for value, key in wanted):
            return name, size
    raise Permanent(
        f"no disk of {ctx.machine.name} fits root-device; it has {', '.join(seen) or 'none'}", Code.DISK_MISSING
    )


def disks(facts: Json) -> list[dict[str, str]]:
    """The disks in an agent's facts (`disk.N.key=value`), in the kernel's order."""
    found: dict[int, dict[str, str]] = {}
    for key, value in facts.items():
        parts = key.split(".")
        if len(parts) == 3 and parts[0] == "disk" and parts[1].isdigit():
            found.setdefault(int(parts[1]), {})[parts[2]] = str(value)
    return [found[number] for number in sorted(found) if "name" in found[number]]


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB"


def agents_work(ctx: Context) -> Outcome:
    """What the agent was told to do, as far as it has reported."""
    operation = ctx.operation
    if operation.state is OperationState.DONE:
        return Done()
    if operation.state is OperationState.FAILED:
        raise Permanent(operation.error, Code(operation.code))
    if ctx.boot is not None and ctx.boot.state is BootState.FAILED:
        raise Permanent(ctx.boot.error, Code.BOOT_CONTESTED)
    if ctx.boot is None or ctx.boot.state is not BootState.UP:
        raise Permanent("the agent's boot is over", Code.AGENT_SILENT)
    _still_on(ctx, since=max(operation.changed_at, ctx.boot.seen_at))
    doing = f"the agent is at {operation.kind}" if operation.state is OperationState.RUNNING else "the agent is told"
    return Wait(30, doing, mark=f"{operation.state} {operation.phase_now} {operation.done}")


def erase_order(_ctx: Context) -> dict[str, str]:
    """All disks, no old byte readable through the device."""
    return {"level": "default"}


def write_order(ctx: Context) -> dict[str, str]:
    """Which image goes to which disk."""
    build, disk = ctx.build, root_disk(ctx)
    if build is None:
        raise Permanent("the build that the node was made for is gone", Code.IMAGE_UNREADABLE)
    if build.size > disk[1]:
        raise Permanent(
            f"image {build.image} needs {gigabytes(build.size)}; disk {disk[0]} of {ctx.machine.name} has"
            f" {gigabytes(disk[1])}: choose a smaller image or another root-device",
            Code.DISK_TOO_SMALL,
        )
    encoding, file = ("zstd", build.files["raw.zst"]) if "raw.zst" in build.files else ("raw", build.files["raw"])
    return {
        "url": f"{base_url(ctx)}/files/images/{Path(file).name}",
        "size": str(build.size),
        "sha256": build.sha256,
        "encoding": encoding,
        "device": disk[0],
    }


def base_url(ctx: Context) -> str:
    """Where the boot listener is, as the machine sees it."""
    if ctx.network is None:  # fake machines fetch nothing
        return "fake:"
    return f"http://{ctx.network.address or ctx.network.gateway}:{ctx.network.port}"


def configure_order(ctx: Context) -> dict[str, str]:
    """Make the new system ours: its own host key, its name, nodepool's key."""
    assert ctx.node is not None
    return {
        "hostname": ctx.node.hostname,
        "user": ctx.node.username,
        "authorized_keys": ctx.ports.public_key,
        "instance_id": f"nodepool-{ctx.node.id}",
        "device": root_disk(ctx)[0],
    }


def configure(ctx: Context) -> Outcome:
    """Keep the host key that the agent has made."""
    outcome = agents_work(ctx)
    if not isinstance(outcome, Done):
        return outcome
    host_key = str(ctx.operation.result.get("host_key", ""))
    if len(host_key.split()) < 2:
        raise Permanent("the agent reported no host key for the new system", Code.AGENT_ERROR)
    return Done(node={"host_key": " ".join(host_key.split()[:2])})


def start_order(ctx: Context) -> dict[str, str]:
    """Start the new system: by kexec where that is wanted and works, else by reboot."""
    return {"method": start_method(ctx), "device": root_disk(ctx)[0]}


def start_method(ctx: Context) -> str:
    """How to start: as the label says, but never again by kexec where that has failed for this build on this model.

    With `auto` the first node of every build starts by firmware, BIOS and UEFI each, which proves the loader on the
    disk; after that kexec saves a self test.
    """
    wanted = ctx.offer.start if ctx.offer else "auto"
    known = ctx.build.starts if ctx.build else {}
    if wanted == "reboot" or model_of(ctx.machine) in known.get("no_kexec", ()):
        return "reboot"
    proven = firmware_of(ctx.machine) in known.get("proven", ())
    return "kexec" if wanted == "kexec" or proven else "reboot"


def start(ctx: Context) -> Outcome:
    """The agent has said that it goes down: its boot is over."""
    outcome = agents_work(ctx)
    if not isinstance(outcome, Done):
        return outcome
    return Done(end_boot=True, node={"started_by": ctx.operation.params["method"]})


def login(ctx: Context) -> Outcome:
    """READY is proven: a login over a connection that proved the key made on this disk, and a boot id of its own."""
    assert ctx.node is not None
    try:
        boot_id = ctx.ports.shell.boot_id(target(ctx))
    except Temporary as error:
        if error.code is Code.LOGIN_SILENT:  # what is to be expected while a system starts
            return Wait(ctx.ports.pace * 2, str(error))
        raise
    if ctx.boot is not None and boot_id == ctx.boot.agent_boot_id:
        raise Permanent("the agent's kernel is still running; the new system was not started", Code.LOGIN_OLD_SYSTEM)
    return Done(node={"os_boot_id": boot_id})


def authorize(ctx: Context) -> Outcome:
    """Put the requestor's keys on."""
    if ctx.keys:
        ctx.ports.shell.authorize(target(ctx), ctx.keys)
    return Done()


def target(ctx: Context) -> Target:
    """The node's own system."""
    assert ctx.node is not None
    return Target(ctx.node.address, ctx.node.port, ctx.node.username, ctx.node.host_key)


_OFF = Step("power-off", power_off, 60, Code.POWER_STUCK)
_ON = Step("power-on", power_on, 60, Code.POWER_STUCK)
_AGENT = Step("agent", agent, None, Code.BOOT_SILENT)

JOBS: Jobs = {
    MachineState.INSPECTING: (
        _OFF,
        _ON,
        _AGENT,
        Step("identity", identity, 60, Code.IDENTITY),
        Step("check", check, 60, Code.DISK_MISSING),
    ),
    MachineState.CLEANING: (_OFF, _ON, _AGENT, Step("erase", agents_work, 120, Code.AGENT_SILENT, erase_order)),
    MachineState.AVAILABLE: (Step("switch-off", switch_off, 60, Code.POWER_STUCK),),
    NodeState.BUILDING: (
        _OFF,
        _ON,
        _AGENT,
        Step("write", agents_work, 120, Code.AGENT_SILENT, write_order),
        Step("configure", configure, 120, Code.AGENT_SILENT, configure_order),
        Step("start", start, 60, Code.AGENT_SILENT, start_order),
        Step("login", login, None, Code.LOGIN_SILENT, kexec_code=Code.KEXEC_FAILED),
    ),
    NodeState.DELETING: (_OFF, _ON, _AGENT),
    HAND_OVER: (Step("authorize", authorize, 60, Code.LOGIN_SILENT),),
}
