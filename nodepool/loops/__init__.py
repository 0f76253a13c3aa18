"""The loops of the daemon, one file each."""
