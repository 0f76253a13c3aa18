"""Drivers: how each kind of provider makes and unmakes a node, as steps."""
