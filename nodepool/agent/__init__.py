"""What runs in the ramdisk of a machine; package data."""
