"""The virtual rack: real QEMU machines behind real IPMI BMCs, for the demo and the tests."""
