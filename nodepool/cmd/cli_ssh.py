"""`nodepool ssh`: log in to a node as nodepool knows it, and to nothing that only has its address."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from nodepool.cmd.client import FAILED, REFUSED, Client, CommandError, part

ALIVE = frozenset({"ready", "in-use", "hold"})  # states in which a node can be logged in to


def ssh(client: Client, args: argparse.Namespace) -> NoReturn:
    """`ssh NODE [COMMAND...]`: becomes ssh, whose exit status is then the command's."""
    node = client.get(f"/nodes/{part(args.node)}")
    if node["state"] not in ALIVE:
        raise CommandError(f"node {node['id']} is {node['state']}: there is no system to log in to", REFUSED)
    if not node["host_key"]:
        raise CommandError(f"node {node['id']} has no host key: it cannot be proven who answers", REFUSED)
    sys.stdout.flush()
    try:
        os.execvp("ssh", command(node, args.words, args.identity))  # noqa: S606 - no shell reads these words
    except OSError as error:
        raise CommandError(f"ssh cannot be run: {error.strerror}; install openssh-client", FAILED) from error


def command(node: dict[str, Any], words: list[str], identity: str = "") -> list[str]:
    """The words of OpenSSH (8.5 or newer) that log in to `node`, which must show its own host key.

    The host key goes by KnownHostsCommand (ssh_config(5)): a file of known hosts could not be removed after ssh has
    taken this process's place.  nodepool's own key is tried when the user may read it, then only that; otherwise the
    user's own keys, as ssh finds them.
    """
    kind, key = node["host_key"].split()[:2]
    if not (kind + key).isascii() or any(char in "\"'\\%$" for char in kind + key):
        raise CommandError(f"the host key of node {node['id']} is damaged", REFUSED)
    options = {
        "KnownHostsCommand": f"/bin/echo %H {kind} {key}",
        "UserKnownHostsFile": "none",
        "GlobalKnownHostsFile": "none",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": "15",  # a node may be on a network that is reached from elsewhere only
        "UpdateHostKeys": "no",
        "ControlPath": "none",  # a connection that somebody else has opened has proven nothing to us
    }
    keyed = identity or (node["login_key"] if os.access(node["login_key"], os.R_OK) else "")
    if keyed:
        options["IdentitiesOnly"] = "yes"
    return [
        "ssh",
        *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
        *(("-i", keyed) if keyed else ()),
        *("-p", str(node["port"]), "-l", node["username"], "--", node["address"]),
        *(words[1:] if words[:1] == ["--"] else words),
    ]
