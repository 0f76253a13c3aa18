"""The virtual rack: real QEMU machines behind real IPMI BMCs, for the demo and the tests.

Imported by `cmd/rack.py` and by tests alone.  It shares no IPMI code with `drivers/`: a bug that both ends have in
common would hide.
"""

from nodepool.errors import NodepoolError


class RackError(NodepoolError):
    """The rack cannot do what was asked; the message is one sentence with its remedy."""
