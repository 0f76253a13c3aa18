"""What can go wrong, in the few words that the rest of the program decides by.

A step answers with `Temporary` (look again after `delay` seconds) or `Permanent` (looking again cannot help); a use
case with `NotFound`, `Refused` or `Conflict`; the configuration with `ConfigError`.  Each failure has a `Code`, which
says whose fault it is: only a fault of the machine burns one of the machine's strikes.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Whose fault a failure is."""

    MACHINE = "machine"
    IMAGE = "image"
    NETWORK = "network"
    SERVICE = "service"
    USER = "user"


class Code(StrEnum):
    """The closed set of failure codes; statsd, strikes and the sentences shown to people all use these words."""

    BMC_UNREACHABLE = "bmc-unreachable"
    BMC_AUTH = "bmc-auth"
    BMC_SUITE = "bmc-suite"
    BMC_BUSY = "bmc-busy"
    BMC_REFUSED = "bmc-refused"
    BMC_UNKNOWN_OUTCOME = "bmc-unknown-outcome"
    POWER_STUCK = "power-stuck"
    POWER_LOST = "power-lost"
    BOOT_SILENT = "boot-silent"
    BOOT_CONTESTED = "boot-contested"
    BOOT_FOREIGN = "boot-foreign"
    AGENT_SILENT = "agent-silent"
    AGENT_ERROR = "agent-error"
    IDENTITY = "identity"
    DISK_MISSING = "disk-missing"
    DISK_TOO_SMALL = "disk-too-small"
    DISK_WRITE = "disk-write"
    DISK_READBACK = "disk-readback"
    DISK_ERASE = "disk-erase"
    IMAGE_ALTERED = "image-altered"
    IMAGE_UNREADABLE = "image-unreadable"
    IMAGE_BUILD = "image-build"
    LOGIN_SILENT = "login-silent"
    LOGIN_HOST_KEY = "login-host-key"
    LOGIN_AUTH = "login-auth"
    LOGIN_OLD_SYSTEM = "login-old-system"
    TRANSFER = "transfer"
    KEXEC_FAILED = "kexec-failed"
    TIMEOUT = "timeout"
    CONFIG = "config"
    CANCELLED = "cancelled"
    UNEXPECTED = "unexpected"

    @property
    def fault(self) -> Fault:
        """Whose fault a failure with this code is."""
        return _FAULTS.get(self, Fault.MACHINE)


_FAULTS = {
    Code.BMC_AUTH: Fault.USER,
    Code.BMC_SUITE: Fault.USER,
    Code.BOOT_FOREIGN: Fault.NETWORK,
    Code.BOOT_CONTESTED: Fault.NETWORK,
    Code.IDENTITY: Fault.USER,
    Code.DISK_TOO_SMALL: Fault.IMAGE,
    Code.IMAGE_ALTERED: Fault.IMAGE,
    Code.IMAGE_UNREADABLE: Fault.IMAGE,
    Code.IMAGE_BUILD: Fault.IMAGE,
    Code.LOGIN_SILENT: Fault.IMAGE,
    Code.LOGIN_HOST_KEY: Fault.IMAGE,
    Code.LOGIN_AUTH: Fault.IMAGE,
    Code.LOGIN_OLD_SYSTEM: Fault.MACHINE,
    Code.TRANSFER: Fault.NETWORK,
    Code.POWER_LOST: Fault.SERVICE,
    Code.KEXEC_FAILED: Fault.SERVICE,
    Code.CONFIG: Fault.USER,
    Code.CANCELLED: Fault.USER,
    Code.UNEXPECTED: Fault.SERVICE,
}


class NodepoolError(Exception):
    """Base of everything this program raises on purpose."""


class StepError(NodepoolError):
    """A step did not reach its goal; `code` names the failure, the message is a sentence for people."""

    def __init__(self, message: str, code: Code = Code.UNEXPECTED) -> None:
        super().__init__(message)
        self.code = code


class Temporary(StepError):
    """Look again after `delay` seconds."""

    def __init__(self, message: str, code: Code = Code.UNEXPECTED, delay: float = 10.0) -> None:
        super().__init__(message, code)
        self.delay = delay


class Permanent(StepError):
    """Looking again cannot help."""


class UseCaseError(NodepoolError):
    """A use case was not carried out; nothing was changed."""


class NotFound(UseCaseError):
    """There is no such thing."""


class Refused(UseCaseError):
    """The thing exists, and its state or the rules do not allow what was asked."""


class Conflict(UseCaseError):
    """Somebody else changed the row in the meantime; the next pass sees the truth."""


class IllegalTransition(UseCaseError):
    """The lifecycle's table has no such transition; the state is unchanged."""


class OutOfOffice(NodepoolError):
    """Somebody else has taken this office over; whoever held it must not act any more."""


class StoreUnavailable(NodepoolError):
    """The database does not answer or stays locked; nothing was written."""


class ConfigError(NodepoolError):
    """The configuration cannot be used; `problems` lists every reason, one sentence with its place each."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
