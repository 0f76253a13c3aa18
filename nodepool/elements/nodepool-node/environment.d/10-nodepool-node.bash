# DIB_NODEPOOL_KERNEL names the kernel's package; when it is empty the root element decides.
export DIB_NODEPOOL_KERNEL=${DIB_NODEPOOL_KERNEL:-}

# The kernel's command line, less its root= (the assembly knows that); the name is diskimage-builder's own.
export DIB_BOOTLOADER_DEFAULT_CMDLINE=${DIB_BOOTLOADER_DEFAULT_CMDLINE:-quiet console=tty0 console=ttyS0,115200n8}

# systemd-networkd looks after the cards, whatever they are called: no list of names, no ifupdown.
export DIB_APT_MINIMAL_CREATE_INTERFACES=${DIB_APT_MINIMAL_CREATE_INTERFACES:-0}
