# The kernel package.  The generic kernel drives real servers; virtual machines boot quicker with
# linux-image-cloud-amd64, which leaves the drivers of real hardware out.
export DIB_NODEPOOL_KERNEL=${DIB_NODEPOOL_KERNEL:-linux-image-${ARCH:-amd64}}

# The kernel's command line, less its root= (the assembly knows that); the name is diskimage-builder's own.
export DIB_BOOTLOADER_DEFAULT_CMDLINE=${DIB_BOOTLOADER_DEFAULT_CMDLINE:-quiet console=tty0 console=ttyS0,115200n8}

# systemd-networkd looks after the cards, whatever they are called: no list of names, no ifupdown.
export DIB_APT_MINIMAL_CREATE_INTERFACES=${DIB_APT_MINIMAL_CREATE_INTERFACES:-0}
