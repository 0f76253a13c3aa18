#!/bin/sh
# nodepool's agent: the program that works on a machine which was booted over the network, from RAM.
#
# It speaks first, always; the daemon only answers (doc/agent-protocol.rst is the contract).  After `hello`, which tells
# what the machine is, it polls; when an answer holds an operation it starts a worker for it (this program again, in a
# session of its own, so that all of it can be stopped at once) and reports on it until the last report was heard.
#
#   /run/nodepool/results/ID     the last report on every operation that was carried out: nothing is done twice
#   /run/nodepool/ID/            a worker's folder: instruction, meters (how far it is), result once it is there
#   /run/nodepool/news           a FIFO: a worker that has ended opens it, which wakes the poll loop
#   /run/nodepool/erased.DISK    DISK reads as zeros all over, seen by this agent and not written since
#
# For people: everything of interest is said on standard error, which is the machine's console.
# For tests: the environment can name other roots than /sys, /dev, /proc and /run; the program can be sourced.
# Needs busybox sh, and of the real tools (whose busybox twins lack what is used here) those named by path below.
set -u
export LC_ALL=C

VERSION=1
SYS=${NODEPOOL_SYS:-/sys}
DEV=${NODEPOOL_DEV:-/dev}
PROC=${NODEPOOL_PROC:-/proc}
STATE=${NODEPOOL_STATE:-/run/nodepool}
PROOF=${NODEPOOL_PROOF:-/run/proof}        # a small file system in RAM: see reads_as_zeros
REBOOT=${NODEPOOL_REBOOT:-}                # how to restart this machine; set in the ramdisk alone
REPORT_EVERY=${NODEPOOL_REPORT_EVERY:-5}   # seconds between reports on work that goes on
PATIENCE=${NODEPOOL_PATIENCE:-120}         # seconds a broken transfer is tried anew before it has failed
PIECE=${NODEPOOL_PIECE:-67108864}          # bytes of an image that are fetched at a time into RAM
STEP=1073741824                            # bytes that are zeroed at a time

dd() { /bin/dd "$@"; }
blkdiscard() { /sbin/blkdiscard "$@"; }
blockdev() { /sbin/blockdev "$@"; }

say() { printf 'nodepool agent: %s\n' "$*" >&2; }

# ---- the protocol's form: key=value lines, values percent-encoded, nothing ever evaluated -------------------------

# encode VALUE: everything but letters, digits and -._~ as %XX (RFC 3986).
encode() {
    case $1 in
    *[!A-Za-z0-9._~-]*) ;;
    *) printf '%s' "$1"; return ;;
    esac
    printf '%s' "$1" | od -An -v -tx1 | awk '
        BEGIN { for (i = 32; i < 127; i++) { c = sprintf("%c", i); if (c ~ /[A-Za-z0-9._~-]/) plain[sprintf("%02x", i)] = c } }
        { for (i = 1; i <= NF; i++) printf "%s", ($i in plain) ? plain[$i] : "%" toupper($i) }'
}

# decode VALUE: the opposite.  Zero bytes, which no shell can hold, are left out; a % without two hex digits stays.
decode() {
    case $1 in
    *%*) ;;
    *) printf '%s' "$1"; return ;;
    esac
    printf '%b' "$(printf '%s' "$1" | awk '{
        gsub(/\\/, "\\\\&")
        while (match($0, /%[0-9A-Fa-f][0-9A-Fa-f]/)) {
            byte = 16 * (index("0123456789ABCDEF", toupper(substr($0, RSTART + 1, 1))) - 1)
            byte += index("0123456789ABCDEF", toupper(substr($0, RSTART + 2, 1))) - 1
            printf "%s%s", substr($0, 1, RSTART - 1), byte ? sprintf("\\0%03o", byte) : ""
            $0 = substr($0, RSTART + 3)
        }
        printf "%s", $0
    }')"
}

# line KEY VALUE: one line of a body.
line() {
    printf '%s=' "$1"
    encode "$2"
    echo
}

# value FILE KEY: the decoded value of KEY in a body, empty when it is not there.
value() { decode "$(sed -n "s/^$2=//p" "$1" | head -n 1)"; }

# word NAME: the value of NAME=... on the kernel's command line.
word() { tr ' ' '\n' <"$PROC/cmdline" | sed -n "s/^$1=//p" | tail -n 1; }

number() {
    case $1 in
    '' | *[!0-9]*) return 1 ;;
    esac
}

# post PATH BODY-FILE: leaves the answer's body in $STATE/answer; prints the status, 000 when there was no answer.
post() {
    : >"$STATE/answer"
    curl -q -sS --noproxy '*' --connect-timeout 5 --max-time 45 --max-filesize 65536 -o "$STATE/answer" \
        -H 'Content-Type: text/plain' -w '%{http_code}' --data-binary "@$2" "$URL/agent/v1/$1" 2>"$STATE/curl.err" ||
        printf ' 000'
}

# ---- facts ---------------------------------------------------------------------------------------------------------

# first FILE...: the first line of the first file that has one, trimmed.
first() {
    for file; do
        if [ -r "$file" ]; then
            found=$(tr -d '\000' <"$file" 2>/dev/null | sed -n '1{s/^ *//;s/ *$//;p;}')
            [ -n "$found" ] && printf '%s' "$found" && return
        fi
    done
}

# disks: the names of all whole disks of this machine's hardware, in the kernel's order.  Left out: what has no
# hardware behind it (RAM, loop, device-mapper), optical drives, an eMMC's boot areas, hidden paths of a multipath NVMe,
# empty card readers, and removable media that cannot be written (a BMC's virtual ones).
disks() {
    for block in "$SYS"/block/*; do
        name=${block##*/}
        case $name in
        ram* | loop* | sr* | fd* | dm-* | md* | zram* | nbd* | mmcblk*boot* | mmcblk*rpmb) continue ;;
        esac
        [ -e "$block/device" ] || continue
        [ "$(first "$block/hidden")" = 1 ] && continue
        [ "$(first "$block/size")" = 0 ] && continue
        [ "$(first "$block/removable")$(first "$block/ro")" = 11 ] && continue
        printf '%s %s\n' "${#name}" "$name" # sdz comes before sdaa
    done | sort -k 1,1n -k 2 | cut -d ' ' -f 2
}

# disk_size NAME: bytes; the kernel counts in 512 whatever the disk's sectors are.
disk_size() { echo $(($(cat "$SYS/block/$1/size") * 512)); }

# disk_serial NAME: SCSI keeps it behind the 4 bytes' head of a page of its own.
disk_serial() {
    block=$SYS/block/$1
    serial=$(first "$block/serial" "$block/device/serial")
    [ -z "$serial" ] && [ -r "$block/device/vpd_pg80" ] &&
        serial=$(tail -c +5 "$block/device/vpd_pg80" | tr -cd ' -~' | sed 's/^ *//;s/ *$//')
    printf '%s' "$serial"
}

disk_facts() {
    n=0
    for disk in $(disks); do
        block=$SYS/block/$disk
        line "disk.$n.name" "$disk"
        line "disk.$n.size" "$(disk_size "$disk")"
        line "disk.$n.serial" "$(disk_serial "$disk")"
        line "disk.$n.wwn" "$(first "$block/wwid" "$block/device/wwid")"
        line "disk.$n.model" "$(first "$block/device/model")"
        line "disk.$n.rotational" "$(first "$block/queue/rotational")"
        n=$((n + 1))
    done
}

nic_facts() {
    n=0
    for nic in "$SYS"/class/net/*; do
        [ -e "$nic/device" ] || continue
        line "nic.$n.name" "${nic##*/}"
        line "nic.$n.mac" "$(first "$nic/address")"
        n=$((n + 1))
    done
}

facts() {
    dmi=$SYS/class/dmi/id
    firmware=bios
    [ -d "$SYS/firmware/efi" ] && firmware=uefi
    line fact.arch "$(uname -m)"
    line fact.cpus "$(grep -c '^processor' "$PROC/cpuinfo")"
    line fact.memory "$(awk '/^MemTotal:/ { printf "%.0f", $2 * 1024 }' "$PROC/meminfo")"
    line fact.firmware "$firmware"
    line fact.uuid "$(first "$dmi/product_uuid" | tr 'A-F' 'a-f')"
    line fact.serial "$(first "$dmi/product_serial")"
    line fact.vendor "$(first "$dmi/sys_vendor")"
    line fact.product "$(first "$dmi/product_name")"
    nic_facts
    disk_facts
}

# ---- what a worker leaves behind (it runs with OP set to its folder) -----------------------------------------------

# done_with [KEY VALUE]...: the operation has succeeded, with these results.
done_with() {
    line state "done" >"$OP/result.new"
    while [ $# -ge 2 ]; do
        line "result.$1" "$2" >>"$OP/result.new"
        shift 2
    done
    [ -e "$OP/result" ] || mv "$OP/result.new" "$OP/result"
}

# fail CODE SENTENCE: the operation has failed; ends this (sub)shell.  The first failure is the one that counts.
fail() {
    if [ ! -e "$OP/result" ]; then
        say "$(value "$OP/instruction" kind) failed: $2"
        { line state failed; line code "$1"; line error "$2"; } >"$OP/result.$1"
        mv "$OP/result.$1" "$OP/result"
    fi
    exit 1
}

stop_if_failed() { [ ! -e "$OP/result" ] || exit 1; }

# phase WORD TOTAL: what is done now, and how many bytes that is.  Meters start anew.
phase() {
    rm -f "$OP"/meter.*
    printf '%s %s\n' "$1" "$2" >"$OP/phase.new"
    mv "$OP/phase.new" "$OP/phase"
}

# meter NAME BYTES: so much is done of NAME; what a dd with its log in meter.NAME.log has moved is added.
meter() {
    rm -f "$OP/meter.$1.log"
    echo "$2" >"$OP/meter.$1"
}

# dd_bytes LOG: how far a dd with status=progress is.
dd_bytes() { [ ! -e "$1" ] || tail -c 300 "$1" | tr '\r' '\n' | sed -n 's/^\([0-9][0-9]*\) bytes.*/\1/p' | tail -n 1; }

# metered FOLDER: the bytes done by all meters together.
metered() {
    sum=0
    for meter in "$1"/meter.*; do
        case $meter in
        *.log) more=$(dd_bytes "$meter") ;;
        *) more=$(cat "$meter" 2>/dev/null) ;;
        esac
        number "$more" && sum=$((sum + more))
    done
    echo "$sum"
}

last_words() { tr '\r' '\n' <"$1" | grep -v -e '^$' -e 'records in' -e 'records out' -e 'bytes.*copied' | tail -n 1; }

# ---- erase ---------------------------------------------------------------------------------------------------------

# reads_as_zeros DISK: whether every byte of it, read past the cache, is zero.  Told by a sparse copy: dd skips blocks of
# zeros, so that the copy has no block at all when there was nothing else.  (Some 1 GB/s where a compare through a
# pipe makes 0.2; the first bytes that are not zero fill the small file system of the copy and end it.)
reads_as_zeros() {
    copy=$PROOF/$1
    rm -f "$copy"
    blockdev --flushbufs "$DEV/$1" 2>/dev/null
    dd if="$DEV/$1" of="$copy" bs=1M iflag=direct conv=sparse status=progress 2>"$OP/meter.$1.log"
    status=$?
    blocks=$(stat -c %b "$copy")
    length=$(stat -c %s "$copy")
    rm -f "$copy"
    [ "$blocks" = 0 ] || return 1
    [ "$status" = 0 ] || fail disk-erase "cannot read $1 back: $(last_words "$OP/meter.$1.log")"
    [ "$length" = "$(disk_size "$1")" ] || fail disk-erase "$1 could be read up to byte $length of $(disk_size "$1") only"
}

# zero_by_device DISK: ask the kernel for zeros (BLKZEROOUT): it uses the disk's own command where there is one and writes
# zeros itself where there is none.  Plain discard is never used: what is read afterwards is the disk's choice.
zero_by_device() {
    size=$(disk_size "$1")
    offset=0
    while [ "$offset" -lt "$size" ]; do
        length=$((size - offset < STEP ? size - offset : STEP))
        blkdiscard -f -z -o "$offset" -l "$length" "$DEV/$1" >/dev/null 2>&1 || return 1
        offset=$((offset + length))
        meter "$1" "$offset"
    done
}

zero_by_writing() {
    meter "$1" 0
    dd if=/dev/zero of="$DEV/$1" bs=1M count="$(disk_size "$1")" iflag=count_bytes oflag=direct conv=notrunc,fsync \
        status=progress 2>"$OP/meter.$1.log" || fail disk-erase "cannot write to $1: $(last_words "$OP/meter.$1.log")"
    meter "$1" "$(disk_size "$1")"
}

# erase_disk DISK: leaves the method that is proven to have worked in $OP/method.DISK.
erase_disk() {
    size=$(disk_size "$1")
    say "erase: $1, $((size / 1000000)) MB"
    rm -f "$STATE/erased.$1"
    method=blkdiscard
    if ! { zero_by_device "$1" && reads_as_zeros "$1"; }; then
        say "erase: $1 cannot be told to be zero, or does not read so; writing zeros over all of it"
        method=zero
        zero_by_writing "$1"
        reads_as_zeros "$1" || fail disk-erase "$1 does not keep the zeros that are written to it: other bytes are read back"
    fi
    meter "$1" $((2 * size))
    : >"$STATE/erased.$1"
    printf '%s' "$method" >"$OP/method.$1"
    say "erase: $1 reads as zeros all over ($method)"
}

# All disks at once: on real ones it takes hours, and they do not hinder each other.
operation_erase() {
    level=$(value "$OP/instruction" level)
    [ "${level:-default}" = default ] || fail agent-error "this agent does not know the erase level $level"
    all=$(disks)
    [ -n "$all" ] || fail disk-missing "this machine shows no disk"
    total=0
    for disk in $all; do
        total=$((total + 2 * $(disk_size "$disk"))) # written, then read
    done
    phase erase "$total"
    for disk in $all; do
        erase_disk "$disk" &
    done
    wait
    stop_if_failed
    set -- disks "$(printf '%s' "$all" | tr '\n' ,)"
    for disk in $all; do
        set -- "$@" "method.$disk" "$(cat "$OP/method.$disk")"
    done
    done_with "$@"
}

# ---- write ---------------------------------------------------------------------------------------------------------

# fetch URL FROM LENGTH: those bytes into $OP/piece.new.  A daemon that restarts or a cable that is out for a moment is
# waited for.  Pieces instead of one stream make that possible, and are quicker than a pipe.
fetch() {
    until_when=$(($(now) + PATIENCE))
    while :; do
        status=$(curl -q -sS --noproxy '*' --connect-timeout 5 --speed-limit 1000 --speed-time 20 --max-filesize "$3" \
            -r "$2-$(($2 + $3 - 1))" -D "$OP/headers" -o "$OP/piece.new" -w '%{http_code}' "$1" 2>"$OP/curl.err") &&
            [ "$status" = 206 ] && return
        case $status in
        206 | 000 | 5??) ;;
        200) fail transfer "$1 was answered whole instead of in part: the server must serve ranges" ;;
        *) fail transfer "$1 was answered with status $status" ;;
        esac
        [ "$(now)" -lt "$until_when" ] || fail transfer "$1 at byte $2: $(transfer_error "$status") for $PATIENCE seconds"
        sleep 2
    done
}

transfer_error() {
    said=$(sed -n 's/^curl: ([0-9]*) //p' "$OP/curl.err" | tail -n 1)
    printf '%s' "${said:-status $1}"
}

now() { cut -d. -f1 "$PROC/uptime"; }

# image_length URL: how many bytes the server has.
image_length() {
    fetch "$1" 0 1
    length=$(tr -d '\r' <"$OP/headers" | sed -n 's/^[Cc]ontent-[Rr]ange: *bytes .*\///p' | tail -n 1)
    number "$length" || fail transfer "$1 was answered without its length"
    echo "$length"
}

# pieces URL LENGTH COMMAND...: calls COMMAND OFFSET for every piece, which is in $OP/piece; the next one is fetched
# meanwhile.
pieces() {
    url=$1
    length=$2
    shift 2
    offset=0
    fetch "$url" 0 $((length < PIECE ? length : PIECE)) &
    while [ "$offset" -lt "$length" ]; do
        wait $! || exit 1
        mv "$OP/piece.new" "$OP/piece"
        next=$((offset + PIECE))
        [ "$next" -ge "$length" ] || fetch "$url" "$next" $((length - next < PIECE ? length - next : PIECE)) &
        "$@" "$offset"
        offset=$next
    done
    rm -f "$OP/piece"
}

# put_piece DISK CONV OFFSET
put_piece() {
    dd if="$OP/piece" of="$DEV/$1" bs=1M oflag=direct,seek_bytes seek="$3" conv="$2" status=none 2>"$OP/dd.err" ||
        fail disk-write "cannot write to $1: $(last_words "$OP/dd.err")"
    meter write $(($3 + $(stat -c %s "$OP/piece")))
}

pour_piece() { cat "$OP/piece"; }

write_raw() {
    length=$(image_length "$1") || exit 1
    [ "$length" = "$2" ] || fail image-altered "the image on the server has $length bytes; $2 were told"
    pieces "$1" "$length" put_piece "$3" "$4"
}

write_zstd() {
    length=$(image_length "$1") || exit 1
    {
        pieces "$1" "$length" pour_piece
    } | {
        zstd -dcq 2>"$OP/zstd.err"
        echo $? >"$OP/zstd.status"
    } | dd of="$DEV/$3" bs=1M count="$2" iflag=fullblock,count_bytes oflag=direct conv="$4" status=progress \
        2>"$OP/meter.write.log" || fail disk-write "cannot write to $3: $(last_words "$OP/meter.write.log")"
    stop_if_failed
    [ "$(cat "$OP/zstd.status")" = 0 ] || fail image-unreadable "the image cannot be unpacked: $(last_words "$OP/zstd.err")"
    written=$(dd_bytes "$OP/meter.write.log")
    [ "$written" = "$2" ] || fail image-altered "the image unpacks to $written bytes; $2 were told"
}

# sha256: of standard input.  openssl uses the processor's own instructions where it has them.
sha256() {
    if grep -q '^flags.* sha_ni' "$PROC/cpuinfo"; then
        openssl dgst -sha256 -r
    else
        /bin/sha256sum
    fi | cut -c 1-64
}

# disk_sha256 DISK SIZE: of what is on the disk, past the cache; a tail shorter than a sector cannot be read so.
disk_sha256() {
    whole=$(($2 / 4096 * 4096))
    sync
    blockdev --flushbufs "$DEV/$1" 2>/dev/null
    {
        dd if="$DEV/$1" bs=1M count="$whole" iflag=direct,count_bytes status=progress 2>"$OP/meter.verify.log" ||
            fail disk-readback "cannot read $1 back: $(last_words "$OP/meter.verify.log")"
        [ "$whole" = "$2" ] || dd if="$DEV/$1" iflag=skip_bytes,count_bytes skip="$whole" count=$(($2 - whole)) status=none
    } | sha256
}

# blame URL ENCODING TOLD FOUND DISK: the disk has not what was told.  Was it the wire or the disk?  Hashing the stream
# while it is written would cost every deploy as much again as the proof itself, so the rare failure pays: the image
# is fetched once more and hashed.
blame() {
    phase blame 0
    length=$(image_length "$1") || exit 1
    wire=$(
        if [ "$2" = zstd ]; then
            pieces "$1" "$length" pour_piece | zstd -dcq 2>/dev/null | sha256
        else
            pieces "$1" "$length" pour_piece | sha256
        fi
    )
    stop_if_failed
    [ "$wire" = "$3" ] || fail image-altered "the image that comes from the server has the sha256 $wire; $3 was told"
    fail disk-readback "$5 holds other bytes than were written: sha256 $4 is read back, $3 came from the server"
}

# partitions DISK: its partitions' names, the last one on the disk first.
partitions() {
    for part in "$SYS/block/$1/$1"*; do
        [ -e "$part/partition" ] && printf '%s %s\n' "$(cat "$part/start")" "${part##*/}"
    done | sort -rn | cut -d ' ' -f 2
}

# mount_in PARTITION FOLDER: by any file system that images come with.
mount_in() {
    for kind in ext4 xfs btrfs; do
        modprobe -q "$kind" 2>/dev/null
        mount -t "$kind" "$DEV/$1" "$2" 2>/dev/null && return
    done
    return 1
}

# grow DISK: the last partition and its file system to the end of the disk.
grow() {
    blockdev --rereadpt "$DEV/$1" 2>/dev/null
    last=$(partitions "$1" | head -n 1)
    if [ -n "$last" ]; then
        index=$(cat "$SYS/block/$1/$last/partition")
        echo ', +' | sfdisk -q -N "$index" --no-reread "$DEV/$1" >"$OP/sfdisk.err" 2>&1 ||
            fail image-unreadable "cannot grow partition $index of the image: $(last_words "$OP/sfdisk.err")"
        blockdev --rereadpt "$DEV/$1" || fail disk-write "the kernel does not take the new partition table of $1"
    fi
    grow_file_system "${last:-$1}"
}

# Online, as that asks for no full check first.  Others than ext4 are left for the image's own first boot.
grow_file_system() {
    folder=$OP/root
    mkdir -p "$folder"
    magic=$(dd if="$DEV/$1" bs=1 skip=1080 count=2 status=none | od -An -tx1 | tr -d ' ')
    if [ "$magic" = 53ef ]; then
        mount -t ext4 "$DEV/$1" "$folder" 2>"$OP/mount.err" ||
            fail image-unreadable "the file system on $1 cannot be mounted: $(last_words "$OP/mount.err")"
        resize2fs "$DEV/$1" >"$OP/resize.err" 2>&1
        status=$?
        umount "$folder"
        [ "$status" = 0 ] || fail image-unreadable "cannot grow the file system on $1: $(last_words "$OP/resize.err")"
    else
        say "write: no ext4 on $1; its file system is left as it is"
    fi
}

# system_partition DISK: its EFI system partition's name, by its type in the partition table.
system_partition() {
    for part in $(partitions "$1"); do
        case $(sfdisk --part-type "$DEV/$1" "$(cat "$SYS/block/$1/$part/partition")" 2>/dev/null) in
        C12A7328-F81F-11D2-BA4B-00A0C93EC93B | c12a7328-f81f-11d2-ba4b-00a0c93ec93b | [eE][fF]) printf '%s' "$part" ;;
        esac
    done
}

# has_loader PARTITION: whether the loader that firmware looks for by itself is on it (UEFI 2.10, section 3.5.1.1).
has_loader() {
    mkdir -p "$OP/root"
    modprobe -q -a vfat nls_cp437 nls_ascii 2>/dev/null
    mount -t vfat -o ro "$DEV/$1" "$OP/root" 2>/dev/null || return 1
    [ -e "$OP/root/EFI/BOOT/BOOTX64.EFI" ]
    loader=$?
    umount "$OP/root"
    return "$loader"
}

# own_identities: of every partition of this machine's disks, as boot entries name them; one per line, lower case.
own_identities() {
    for disk in $(disks); do
        for part in $(partitions "$disk"); do
            sfdisk --part-uuid "$DEV/$disk" "$(cat "$SYS/block/$disk/$part/partition")" 2>/dev/null
        done
    done | tr 'A-F' 'a-f'
}

# disk_entries: reads `efibootmgr -v`; NUMBER IDENTITY for every entry that starts a file on a disk's partition.
disk_entries() {
    sed -n 's/^Boot\([0-9A-F]\{4\}\)[* ].*HD([0-9]*,[GM][PB][TR],\([0-9A-Fa-fx-]*\),.*File(.*/\1 \2/p' | tr 'A-F' 'a-f'
}

# tidy_boot_entries DISK: the firmware starts what was just written, first of all, and forgets systems that are gone.
# Most firmware finds \EFI\BOOT\BOOTX64.EFI by itself, on some only once every entry it has was tried: entries of earlier
# lives, which fill its memory, and the network.  So whatever goes wrong here is said, and fails nothing.
tidy_boot_entries() {
    [ -d "$SYS/firmware/efi" ] || return 0
    if ! command -v efibootmgr >/dev/null; then
        say "boot entries: left alone, as this ramdisk has no efibootmgr (agent-build takes it along where it is installed)"
        return
    fi
    part=$(system_partition "$1")
    if [ -z "$part" ] || ! has_loader "$part"; then
        say "boot entries: left alone, as $1 has no EFI/BOOT/BOOTX64.EFI on an EFI system partition"
        return
    fi
    own_identities >"$OP/identities"
    if ! efibootmgr -v >"$OP/entries" 2>"$OP/efi.err"; then
        say "boot entries: cannot be read: $(last_words "$OP/efi.err")"
        return
    fi
    disk_entries <"$OP/entries" >"$OP/on_disks"
    while read -r entry identity; do
        if ! grep -qxF -e "$identity" "$OP/identities" || grep -qi "^Boot${entry}[* ] nodepool" "$OP/entries"; then
            say "boot entries: $entry goes, of partition $identity"
            efibootmgr -q -B -b "$entry" 2>"$OP/efi.err" || say "boot entries: it stays: $(last_words "$OP/efi.err")"
        fi
    done <"$OP/on_disks"
    if efibootmgr -q -c -d "$DEV/$1" -p "$(cat "$SYS/block/$1/$part/partition")" -L nodepool \
        -l '\EFI\BOOT\BOOTX64.EFI' 2>"$OP/efi.err"; then
        say "boot entries: $part first"
    else
        say "boot entries: none for $part: $(last_words "$OP/efi.err")"
    fi
}

# operation_disk: the disk that the instruction names.
operation_disk() {
    disk=$(value "$OP/instruction" device)
    disks | grep -qxF -e "$disk" || fail disk-missing "this machine has no disk $disk; it has $(disks | tr '\n' ' ')"
    printf '%s' "$disk"
}

operation_write() {
    disk=$(operation_disk) || exit 1
    url=$(value "$OP/instruction" url)
    size=$(value "$OP/instruction" size)
    least=$(value "$OP/instruction" min_size)
    told=$(value "$OP/instruction" sha256 | tr 'A-F' 'a-f')
    encoding=$(value "$OP/instruction" encoding)
    number "$size$least" || fail agent-error "the size '$size' or min_size '$least' is no number"
    [ "${least:-0}" -ge "$size" ] || least=$size
    room=$(disk_size "$disk")
    [ "$room" -ge "$least" ] || fail disk-too-small "$disk has $room bytes; the image needs $least"
    conv=notrunc
    [ -e "$STATE/erased.$disk" ] && conv=notrunc,sparse # holes are zeros there already; the read-back proves it
    rm -f "$STATE/erased.$disk"
    say "write: $((size / 1000000)) MB to $disk from $url"
    phase write "$size"
    case $encoding in
    raw | '') write_raw "$url" "$size" "$disk" "$conv" ;;
    zstd) write_zstd "$url" "$size" "$disk" "$conv" ;;
    *) fail agent-error "this agent does not know the encoding $encoding" ;;
    esac
    phase verify "$size"
    found=$(disk_sha256 "$disk" "$size")
    stop_if_failed
    [ "$found" = "$told" ] || blame "$url" "$encoding" "$told" "$found" "$disk"
    say "write: $disk holds the image, sha256 $found"
    phase grow 0
    grow "$disk"
    tidy_boot_entries "$disk"
    done_with sha256 "$found" written "$size"
}

# ---- configure -----------------------------------------------------------------------------------------------------

# mount_root DISK FOLDER: the partition (or whole disk) that looks like a system's root.
mount_root() {
    for part in $(partitions "$1") "$1"; do
        if mount_in "$part" "$2"; then
            [ -f "$2/etc/passwd" ] && return
            umount "$2"
        fi
    done
    fail image-unreadable "no partition of $1 holds a system (a file system with etc/passwd)"
}

# folder_in PATH: makes the folder PATH of the new system and prints where it is; links that lead out are refused.
folder_in() {
    mkdir -p "$ROOT$1" 2>/dev/null
    real=$(readlink -f "$ROOT$1")
    case $real/ in
    "$ROOT"/*) [ -d "$real" ] && printf '%s' "$real" && return ;;
    esac
    fail image-unreadable "$1 of the image is no folder, or a link that leads out of it"
}

# put FOLDER NAME MODE: standard input into that file; a link of that name is replaced, not followed.
put() {
    rm -f "$1/$2"
    if ! cat >"$1/$2" || ! chmod "$3" "$1/$2"; then
        fail disk-write "cannot write $2 into $1"
    fi
}

set_names() {
    etc=$(folder_in /etc) || exit 1
    printf '%s\n' "$1" | put "$etc" hostname 644
    {
        if [ -f "$etc/hosts" ]; then
            sed '/^127\.0\.1\.1[[:space:]]/d' "$etc/hosts"
        else
            printf '127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n'
        fi
        printf '127.0.1.1\t%s\n' "$1"
    } >"$OP/hosts"
    put "$etc" hosts 644 <"$OP/hosts"
    # A machine of its own: systemd makes a new id, and does not start from the image's random seed.
    : | put "$etc" machine-id 444
    rm -f "$ROOT/var/lib/dbus/machine-id" "$ROOT/var/lib/systemd/random-seed"
}

# make_host_key HOSTNAME: prints the public half.
make_host_key() {
    ssh=$(folder_in /etc/ssh) || exit 1
    rm -f "$ssh"/ssh_host_*
    ssh-keygen -q -t ed25519 -N '' -C "root@$1" -f "$ssh/ssh_host_ed25519_key" >"$OP/keygen.err" 2>&1 ||
        fail disk-write "cannot make the host key: $(last_words "$OP/keygen.err")"
    cut -d ' ' -f 1,2 "$ssh/ssh_host_ed25519_key.pub"
}

# put_keys USER KEYS: into the user's authorized_keys, beside what the image has there.
put_keys() {
    account=$(awk -F : -v user="$1" '$1 == user { print $3 ":" $4 " " $6; exit }' "$ROOT/etc/passwd")
    [ -n "$account" ] || fail image-unreadable "the image has no user $1"
    ssh=$(folder_in "${account#* }/.ssh") || exit 1
    [ -e "$ssh/authorized_keys" ] && cat "$ssh/authorized_keys" >"$OP/keys"
    printf '%s\n' "$2" | sed '/^$/d' >>"$OP/keys"
    awk '!seen[$0]++' "$OP/keys" | put "$ssh" authorized_keys 600
    chmod 700 "$ssh"
    chown "${account%% *}" "$ssh" "$ssh/authorized_keys" || fail disk-write "cannot give $ssh to $1"
}

# seed_cloud_init INSTANCE HOSTNAME: NoCloud data, without which cloud-init looks for a cloud for minutes, deletes the host
# key and forbids root; put there whether cloud-init is installed or not.
seed_cloud_init() {
    seed=$(folder_in /var/lib/cloud/seed/nocloud) || exit 1
    printf 'instance-id: %s\nlocal-hostname: %s\n' "$1" "$2" | put "$seed" meta-data 644
    printf '%s\n' '#cloud-config' 'ssh_deletekeys: false' 'ssh_genkeytypes: [ed25519]' 'disable_root: false' |
        put "$seed" user-data 644
    if [ -d "$ROOT/etc/cloud" ]; then
        config=$(folder_in /etc/cloud/cloud.cfg.d) || exit 1
        printf 'datasource_list: [NoCloud, None]\n' | put "$config" 99-nodepool.cfg 644
    fi
}

operation_configure() {
    disk=$(operation_disk) || exit 1
    name=$(value "$OP/instruction" hostname)
    case $name in
    '' | *[!A-Za-z0-9.-]*) fail agent-error "'$name' is no hostname" ;;
    esac
    phase configure 0
    mkdir -p "$OP/root"
    ROOT=$(readlink -f "$OP/root")
    mount_root "$disk" "$ROOT"
    # In a subshell: whatever fails in there, the file system is unmounted.
    (
        user=$(value "$OP/instruction" user)
        set_names "$name"
        put_keys "${user:-root}" "$(value "$OP/instruction" authorized_keys)"
        seed_cloud_init "$(value "$OP/instruction" instance_id)" "$name"
        make_host_key "$name" >"$OP/host_key"
    )
    status=$?
    umount "$ROOT" || fail disk-write "cannot unmount the root file system of $disk"
    sync
    stop_if_failed
    [ "$status" = 0 ] || fail agent-error "the new system could not be configured; the console says why"
    say "configure: this is $name, host key $(cat "$OP/host_key")"
    done_with host_key "$(cat "$OP/host_key")"
}

# ---- start ---------------------------------------------------------------------------------------------------------

# Reported first, carried out by the poll loop once the report was heard.
operation_start() {
    method=$(value "$OP/instruction" method)
    case $method in
    reboot) done_with ;;
    kexec) load_new_kernel && done_with ;;
    *) fail agent-error "this agent does not know the start method $method" ;;
    esac
}

# Load the installed kernel, so that it can be started without another self test of the firmware.  Its command line is
# the one that the image keeps in /etc/kernel/cmdline (kernel-install(8)).
load_new_kernel() {
    command -v kexec >/dev/null || fail kexec-failed "this ramdisk has no kexec (agent-build found no kexec-tools)"
    disk=$(operation_disk) || exit 1
    mkdir -p "$OP/root"
    ROOT=$(readlink -f "$OP/root")
    mount_root "$disk" "$ROOT"
    if [ -r "$ROOT/etc/kernel/cmdline" ]; then
        kexec -s -l "$ROOT/vmlinuz" --initrd="$ROOT/initrd.img" \
            --command-line="$(cat "$ROOT/etc/kernel/cmdline")" 2>"$OP/kexec.err"
    else
        echo "the image has no /etc/kernel/cmdline" >"$OP/kexec.err"
        false
    fi
    status=$?
    umount "$ROOT" || fail disk-write "cannot unmount the root file system of $disk"
    sync
    [ "$status" = 0 ] || fail kexec-failed "kexec cannot load the new kernel: $(last_words "$OP/kexec.err")"
}

# go_down [METHOD]: start what is on the disk, or the firmware; there is no way back from either.
go_down() {
    sync
    if [ "${1-}" = kexec ]; then
        say "starting the new system by kexec"
        [ -z "$REBOOT" ] || kexec -e
        say "kexec did not start it: restarting this machine"
    else
        say "restarting this machine"
    fi
    $REBOOT
    while :; do sleep 60; done
}

# ---- the worker and its keeper -------------------------------------------------------------------------------------

# worker FOLDER: carries out the instruction in it.
worker() {
    OP=$1
    kind=$(value "$OP/instruction" kind)
    case $kind in
    erase | write | configure | start) "operation_$kind" ;;
    *) fail agent-error "this agent does not know the operation $kind" ;;
    esac
}

# begin ID: start a worker for the instruction in $STATE/answer.
begin() {
    OP=$STATE/$1
    rm -rf "$OP"
    mkdir -p "$OP"
    cp "$STATE/answer" "$OP/instruction"
    say "operation $1: $(value "$OP/instruction" kind)"
    (
        setsid sh "$PROGRAM" worker "$OP" &
        echo $! >"$OP/pid"
        wait $!
        [ -e "$OP/result" ] || (fail agent-error "the work ended without a result; the console may say why")
        cp "$OP/result" "$STATE/results/$1"
        : >"$STATE/news"
    ) &
    KEEPER=$!
}

# lives GROUP: whether a process of that group still does something.
lives() { ps -o pgid,stat | awk -v group="$1" '$1 == group && $2 !~ /^Z/ { found = 1 } END { exit !found }'; }

# stop ID: end its worker and all that it has started.  It leaves no result: told again, it begins anew.
stop() {
    kill "$KEEPER" 2>/dev/null
    group=$(cat "$STATE/$1/pid")
    kill -KILL "-$group"
    tries=0
    while lives "$group" && [ "$tries" -lt 100 ]; do
        usleep 100000 # a write that is under way ends when the disk says so
        tries=$((tries + 1))
    done
    while umount "$STATE/$1/root" 2>/dev/null; do :; done
    rm -rf "${STATE:?}/results/$1" "${STATE:?}/$1"
}

# ---- hello and poll ------------------------------------------------------------------------------------------------

hello() {
    {
        line version "$VERSION"
        line token "$(word nodepool.token)"
        line nonce "$NONCE"
        line agent_boot_id "$(cat "$PROC/sys/kernel/random/boot_id")"
        facts
    } >"$STATE/hello"
    while :; do
        status=$(post hello "$STATE/hello")
        case $status in
        200) break ;;
        403) pause 30 "this boot is not known: $(value "$STATE/answer" error)" ;;
        409) silent "another machine came with this boot's token: $(value "$STATE/answer" error)" ;;
        426) go_down ;;
        503) pause "$(value "$STATE/answer" wait)" "the daemon asks for patience" ;;
        *) pause "$REPORT_EVERY" "no answer to hello: $(trouble "$status")" ;;
        esac
    done
    BOOT=$(value "$STATE/answer" boot)
    say "known as boot $BOOT"
}

trouble() { printf 'status %s %s' "$1" "$(value "$STATE/answer" error) $(cat "$STATE/curl.err")"; }

# pause SECONDS WHY
pause() {
    number "$1" || set -- 10 "$2"
    say "$2; asking again in $1 seconds"
    sleep "$1"
}

# silent WHY: this boot is over.
silent() {
    say "$1; this machine does nothing more until it is switched off"
    while :; do sleep 3600; done
}

# report ID: the body of a poll; ID may be empty.
report() {
    line boot "$BOOT"
    line nonce "$NONCE"
    [ -n "$1" ] || return
    line operation "$1"
    if [ -e "$STATE/results/$1" ]; then
        cat "$STATE/results/$1"
    else
        doing=begin
        total=0
        [ -e "$STATE/$1/phase" ] && read -r doing total <"$STATE/$1/phase"
        bytes=$(metered "$STATE/$1")
        say "operation $1: $doing $((bytes / 1000000)) of $((total / 1000000)) MB"
        line state running
        line "done" "$bytes"
        line total "$total"
        line phase "$doing"
    fi
}

# poll: for ever.  `current` is the operation that is worked on or not yet reported to its end.
poll() {
    current=
    while :; do
        report "$current" >"$STATE/poll"
        status=$(post poll "$STATE/poll")
        case $status in
        200) obey ;;
        403)
            [ -z "$current" ] || stop "$current"
            silent "this boot is over: $(value "$STATE/answer" error)"
            ;;
        409) silent "this boot is contested: $(value "$STATE/answer" error)" ;;
        426) go_down ;;
        *) pause "$REPORT_EVERY" "no answer to a poll: $(trouble "$status")" ;;
        esac
    done
}

# obey: do what the answer in $STATE/answer says.
obey() {
    if grep -q '^state=done' "$STATE/poll" && [ "$(value "$STATE/$current/instruction" kind)" = start ]; then
        go_down "$(value "$STATE/$current/instruction" method)"
    fi
    grep -q -e '^state=done' -e '^state=failed' "$STATE/poll" && current=
    id=$(value "$STATE/answer" operation)
    if [ -n "$id" ]; then
        take_up "$id"
    elif [ -n "$current" ] && [ -n "$(value "$STATE/answer" cancel)" ]; then
        say "operation $current is cancelled"
        stop "$current"
        current=
    elif [ -z "$current" ]; then
        seconds=$(value "$STATE/answer" wait)
        number "$seconds" || seconds=$REPORT_EVERY
        [ "$seconds" = 0 ] || sleep "$seconds"
    fi
    [ -z "$current" ] || [ -e "$STATE/results/$current" ] || wait_for_news
}

# wait_for_news: until a worker ends, which opens the FIFO, or the next report is due.
wait_for_news() {
    { timeout "$REPORT_EVERY" cat "$STATE/news"; } >/dev/null 2>&1
}

# take_up ID: the answer holds this operation.
take_up() {
    case $1 in
    *[!A-Za-z0-9_-]* | news | results) say "ignored: operation with the id '$1'" && sleep "$REPORT_EVERY" && return ;;
    esac
    if [ -n "$current" ]; then
        [ "$current" = "$1" ] || say "ignored: operation $1, while $current is worked on"
        return
    fi
    current=$1
    if [ -e "$STATE/results/$1" ]; then
        sleep 1 # was done already: the last report again, at leisure
    else
        begin "$1"
    fi
}

main() {
    mkdir -p "$STATE/results" "$PROOF"
    rm -f "$STATE/news"
    mkfifo "$STATE/news"
    NONCE=$(od -An -v -tx1 -N 16 /dev/urandom | tr -d ' \n')
    URL=$(word nodepool.url)
    if [ -z "$URL" ] || [ -z "$(word nodepool.token)" ]; then
        silent "the kernel's command line lacks nodepool.url= or nodepool.token="
    fi
    say "version $VERSION, asking $URL"
    hello
    poll
}

PROGRAM=$0
case ${1:-} in
worker) worker "$2" ;;
functions) ;; # sourced by a test
*) main ;;
esac
