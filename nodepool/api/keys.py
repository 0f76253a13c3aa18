"""Public SSH keys as people hand them in: checked before anything is stored, and never repeated in an error.

Imports nothing heavy: the command line checks with the same words before a key leaves the machine.
"""

from __future__ import annotations

import base64
import binascii

TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)  # what OpenSSH 9 takes; DSA is gone from it
LONGEST = 16 * 1024  # bytes; an RSA key of 16384 bits has about 2.8 KiB


def public_key(text: str) -> str:
    """The key as one line `TYPE BASE64 [COMMENT]`, as in a .pub file (RFC 4253 section 6.6).

    Raises ValueError with a sentence that says what is wrong and does not contain the key.
    """
    if "PRIVATE KEY" in text or text.startswith("PuTTY-User-Key-File"):
        raise ValueError("this is a private key: keep it to yourself and give the public one (the file ending in .pub)")
    if len(text) > LONGEST:
        raise ValueError(f"a public key has at most {LONGEST} bytes")
    line = text.strip()
    if not line:
        raise ValueError("the key is empty")
    if not line.isprintable():
        raise ValueError("a public key is one line without control characters")
    kind, _, rest = line.partition(" ")
    if kind not in TYPES:
        raise ValueError(f"a public key begins with its type ({', '.join(TYPES)}), as the line in a .pub file does")
    blob, _, comment = rest.strip().partition(" ")
    if not _begins_with(blob, kind):
        raise ValueError(f"the {kind} key is damaged: what follows the type is not the base64 of such a key")
    return " ".join(filter(None, (kind, blob, comment.strip())))


def public_keys(text: str) -> list[str]:
    """Every key in a file of public keys; blank lines and lines that begin with # are passed over."""
    if "PRIVATE KEY" in text or text.startswith("PuTTY-User-Key-File"):
        return [public_key(text)]
    lines = [line.strip() for line in text.splitlines()]
    keys = [public_key(line) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError("there is no public key in it")
    return keys


def _begins_with(blob: str, kind: str) -> bool:
    """Whether base64 `blob` is a key that names its own type `kind` (a length of four bytes, then the name)."""
    try:
        raw = base64.b64decode(blob, validate=True)
    except (binascii.Error, ValueError):
        return False
    name = kind.encode()
    head = len(name).to_bytes(4, "big") + name
    return raw.startswith(head) and len(raw) >= len(head) + 32
