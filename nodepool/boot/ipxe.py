"""The scripts that machines get from us, for iPXE (https://ipxe.org/cmd).  Pure.

A machine asks twice: DHCP sends every iPXE to the same first script, and that one asks for the script of its machine,
which is made anew from the machine's state each time.  So nothing about DHCP changes when a machine is deployed.
"""

from __future__ import annotations

from nodepool.door import Expected

ASK_EVERY, ASK_TIMES = 5, 60  # seconds; a daemon that restarts must not cost a boot, one that is gone not the disk

# BIOS: start the first disk; what a firmware does after `exit` differs, and some begin the network boot again.  Where
# there is no disk, and by UEFI: say that this boot option has failed, so that the firmware goes on to its next one;
# after a success it may stop and show its menu (UEFI 2.10, section 3.1.1).
_TO_DISK = """\
iseq ${platform} pcbios && sanboot --no-describe --drive 0x80 ||
exit 1
"""


def first(url: str) -> str:
    """The script that DHCP names: ask `url` for the script of the network card that was booted, patiently.

    After five minutes without an answer the machine boots its disk.
    """
    return f"""\
#!ipxe
set tries:int32 0
:ask
chain --replace {url}/boot/${{netX/mac}} ||
inc tries
iseq ${{tries}} {ASK_TIMES} && goto disk ||
echo nodepool at {url} has no answer for ${{netX/mac}} yet: asking again
sleep {ASK_EVERY}
goto ask
:disk
{_TO_DISK}"""


def render(expected: Expected | None, url: str, mac: str) -> str:
    """The script of one machine: the agent with its token when a boot is `expected`, its own disk otherwise.

    `url` is the listener as the machine sees it, `mac` the network card that asks, lower case with colons.
    """
    if expected is None:
        return f"#!ipxe\necho nodepool expects no network boot of {mac}: booting from disk\n{_TO_DISK}"
    return f"""\
#!ipxe
echo nodepool: {expected.machine} boots the agent
imgfree
kernel {url}/files/agent/vmlinuz {_words(expected, url, mac)} || goto again
initrd {url}/files/agent/initrd.img || goto again
boot ||
:again
echo nodepool: the agent could not be started: asking again
sleep {ASK_EVERY}
chain --replace {url}/boot.ipxe || goto again
"""


def _words(expected: Expected, url: str, mac: str) -> str:
    """The kernel's command line; the last console is the one that the agent talks on.

    The kernel's EFI stub looks for the letters `initrd=` anywhere, so no other word may contain them.
    """
    console = expected.console if "," in expected.console else f"{expected.console},115200"
    words = (
        "initrd=initrd.img",
        f"nodepool.url={url}",
        f"nodepool.token={expected.token}",
        f"nodepool.mac={mac}",
        "console=tty0",
        f"console={console}",
        "quiet",  # a slow serial line would hold up the boot; errors still come through
    )
    return " ".join(words)
