#!/bin/sh
# The first process in the agent's ramdisk: makes a system out of a bare kernel, then becomes the agent.
#
# In order: kernel file systems; drivers for what the buses say is there; an address by DHCP on the network card that
# the machine was booted from (nodepool.mac= on the kernel's command line, else on every card); the agent.  It never
# gives up on the network: a switch port may take half a minute, a DHCP server may be restarting.
set -u
export PATH=/usr/sbin:/usr/bin LC_ALL=C HOME=/root

say() { printf 'nodepool init: %s\n' "$*"; }

mount_kernel_file_systems() {
    mount -t devtmpfs -o mode=0755 dev /dev
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t tmpfs -o mode=0755 run /run
    mkdir /run/proof
    mount -t tmpfs -o size=8m proof /run/proof # where the agent copies what should be nothing but zeros
    if [ -d /sys/firmware/efi/efivars ]; then
        modprobe -q efivarfs && mount -t efivarfs efivarfs /sys/firmware/efi/efivars
    fi
    ln -sf /proc/self/fd /dev/fd
}

# A driver may bring up a bus with more devices on it, so look again until nothing new turns up.  A driver's load waits
# for its disks to be probed; SCSI is told to.
load_drivers() {
    modprobe -q scsi_mod scan=sync
    modprobe -q -a sd_mod ext4 vfat
    seen=
    while :; do
        found=$(find /sys/devices -name modalias -exec cat {} + 2>/dev/null | sort -u)
        [ "$found" = "$seen" ] && break
        seen=$found
        # shellcheck disable=SC2086 # one alias per word
        modprobe -q -b -a $found 2>/dev/null
    done
}

word() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1=//p" | tail -n 1; }

# The cards to ask on: the one with the MAC that was told, else all that are hardware.
network_cards() {
    wanted=$(word nodepool.mac | tr 'A-F' 'a-f')
    for card in /sys/class/net/*; do
        [ -e "$card/device" ] || continue
        if [ -z "$wanted" ] || [ "$(cat "$card/address")" = "$wanted" ]; then
            basename "$card"
        fi
    done
}

start_network() {
    ip link set lo up
    until cards=$(network_cards) && [ -n "$cards" ]; do
        say "no network card with MAC $(word nodepool.mac) yet: missing, or without a driver in this ramdisk; waiting"
        sleep 5
        load_drivers
    done
    for card in $cards; do
        ip link set "$card" up
        # Asks for ever, renews for ever; the script writes /run/address once there is one.
        udhcpc -f -i "$card" -s /usr/bin/nodepool-dhcp -t 3 -T 1 -A 2 >/dev/null 2>&1 &
    done
    waited=0
    until [ -e /run/address ]; do
        usleep 100000
        waited=$((waited + 1))
        [ $((waited % 100)) -eq 0 ] &&
            say "no answer from a DHCP server for $((waited / 10)) seconds; asking on, on $(echo "$cards" | tr '\n' ' ')"
    done
    say "address $(cat /run/address)"
}

mount_kernel_file_systems
load_drivers
start_network
export NODEPOOL_REBOOT='reboot -f'
nodepool-agent
say "the agent has ended with status $?; this machine does nothing more until it is switched off"
while :; do sleep 3600; done
