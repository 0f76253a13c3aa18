"""What the YAML means, as frozen records.  Durations are seconds, sizes bytes, paths relative to where we run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Network:
    """A managed segment: the interface that the machines are on and what they are told by DHCP."""

    name: str
    interface: str
    cidr: str
    gateway: str
    dhcp: str = "managed"  # or "external": somebody else serves DHCP there
    address: str = ""  # this daemon's own address there; the gateway's when empty
    port: int = 8090  # of the boot listener
    dns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskImage:
    """A recipe for an image, in the words of upstream's Nodepool."""

    name: str
    release: str = ""
    elements: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("raw",)  # raw and raw.zst
    rebuild_age: float = 86400.0
    build_timeout: float = 28800.0
    env_vars: Mapping[str, str] = field(default_factory=dict, repr=False)  # the secrets file's among them
    dib_cmd: str = "disk-image-create"
    assembly: str = "nodepool"  # or "dib": diskimage-builder (or dib-cmd) makes the whole disk itself
    pause: bool = False
    username: str = "root"


@dataclass(frozen=True, slots=True)
class Label:
    """What users ask for; how many of it are kept READY (-1: switched off) and for how long."""

    name: str
    min_ready: int = 0
    max_ready_age: float = 0.0  # 0: for ever


@dataclass(frozen=True, slots=True)
class Ssh:
    """How nodepool logs in to the nodes that it has made: its private key is made at `key` when missing."""

    user: str = "root"
    key: Path = Path("var/id_ed25519")
    port: int = 22


@dataclass(frozen=True, slots=True)
class Interface:
    """One network card: its MAC in lower case with colons and the address that is reserved for it."""

    mac: str
    ip: str


@dataclass(frozen=True, slots=True)
class RootDevice:
    """Which disk the image goes to: the first whole disk, in the kernel's order, that fits every hint given."""

    min_size: int = 0
    serial: str = ""
    wwn: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine as the YAML declares it."""

    name: str
    provider: str
    rack: str = ""
    bmc: str = ""  # ipmi://HOST[:PORT]
    credentials: str = ""  # a name in the secrets file
    interfaces: tuple[Interface, ...] = ()
    firmware: str = "bios"  # or "uefi"
    root_device: RootDevice = RootDevice()
    accept: bool = False  # may be wiped
    identity: str = "checked"  # the BMC's GUID is that of the system; "unchecked" where the BMC makes one up
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolLabel:
    """A label as a pool offers it."""

    name: str
    diskimage: str
    start: str = "auto"  # auto | kexec | reboot


@dataclass(frozen=True, slots=True)
class Pool:
    """Some machines of a provider, the labels they serve, and how many of them may be nodes at once."""

    name: str
    provider: str
    max_servers: int | None = None  # None: as many as there are machines
    machines: tuple[str, ...] = ()  # resolved from `machines:` or `where:`; all of the provider's when neither is given
    labels: tuple[PoolLabel, ...] = ()


@dataclass(frozen=True, slots=True)
class FakeSettings:
    """How the machines of the `fake` driver behave: seconds per phase, and which fail where."""

    delay: float = 0.1
    failures: Mapping[str, str] = field(default_factory=dict)  # machine name -> phase that fails


@dataclass(frozen=True, slots=True)
class Provider:
    """A source of nodes."""

    name: str
    driver: str  # metal | fake
    network: str = ""
    ssh: Ssh = Ssh()
    machines: tuple[MachineSpec, ...] = ()
    pools: tuple[Pool, ...] = ()
    boot_timeout: float = 900.0  # silence allowed between power-on and a sign of life: servers take minutes to POST
    launch_retries: int = 3  # attempts at one node before it is failed
    strikes: int = 3  # failures of a machine before it is broken
    retry_broken: float = 3600.0  # seconds until a broken machine is inspected again
    park_for: float = 900.0  # seconds that an available machine's agent waits, warm, before it is switched off
    park_max: int | None = None  # machines of one rack that may wait warm at once; None: all of them
    fake: FakeSettings = FakeSettings()


@dataclass(frozen=True, slots=True)
class Statsd:
    """Where metrics go."""

    host: str
    port: int = 8125
    prefix: str = "nodepool"


@dataclass(frozen=True, slots=True)
class Credential:
    """How a BMC lets us in; lives in the secrets file, never in the store."""

    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Config:
    """One generation of the configuration: the whole YAML, checked."""

    generation: str  # first 12 hex digits of the sha256 over the content that was read
    database: str = field(default="sqlite:///var/nodepool.db", repr=False)  # an URL that may hold a password
    socket: Path = Path("var/nodepool.sock")
    images_dir: Path = Path("var/images")
    elements_dir: Path | None = None
    build_log_dir: Path | None = None  # images-dir/logs when not given
    build_log_retention: int = 7  # newest logs kept per image; -1: all
    agent_dir: Path = Path("var/agent")  # the agent's kernel and ramdisk, made by `nodepool agent-build`
    event_retention: float = 30 * 86400.0
    launch_workers: int = 16
    statsd: Statsd | None = None
    networks: Mapping[str, Network] = field(default_factory=dict)
    diskimages: Mapping[str, DiskImage] = field(default_factory=dict)
    labels: Mapping[str, Label] = field(default_factory=dict)
    providers: Mapping[str, Provider] = field(default_factory=dict)
    credentials: Mapping[str, Credential] = field(default_factory=dict, repr=False)
