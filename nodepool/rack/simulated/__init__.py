"""Simulated machines on the wire: real IPMI, the real network boot and agent protocol, real SSH, and no hardware.

Everything is on loopback addresses of the rack's own, in one process, as an ordinary user.  The far side of each
protocol is written anew here, from doc/agent-protocol.rst: a bug that both ends had in common would hide.
"""
