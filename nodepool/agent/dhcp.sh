#!/bin/sh
# Called by udhcpc with what has happened to the lease; sets the card's address and the default route accordingly.
# Names are not looked up by the agent (it is told addresses), so there is no resolver to set.
# udhcpc passes: interface ip mask(prefix length) router(list)
# shellcheck disable=SC2154 # they come in the environment
set -u

case $1 in
deconfig)
    ip -4 addr flush dev "$interface"
    ip link set "$interface" up
    ;;
bound | renew)
    ip -4 addr replace "$ip/${mask:-24}" dev "$interface"
    for gateway in ${router:-}; do
        ip route replace default via "$gateway" dev "$interface" && break
    done
    printf '%s on %s\n' "$ip/${mask:-24}" "$interface" >/run/address.new
    mv /run/address.new /run/address
    ;;
esac
