"""Images: diskimage-builder, assembly of a bootable disk, the ramdisk of the agent."""
