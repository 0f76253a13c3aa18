"""The functions of the agent's program, run by busybox sh as in the ramdisk."""

import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

AGENT = Path(__file__).parents[2] / "nodepool/agent"
BUSYBOX = shutil.which("busybox")
STRANGE = [
    "plain-._~09azAZ",
    "two words",
    "50 % of %41",
    "back\\slash \\n \\0101 \\\\",
    "$(reboot) `reboot` ;reboot & 'x' \"y\" *",
    "zwölf ünits ☃",
    "line one\nline two",
    "tab\tand = sign",
    "-n",
    "",
]

pytestmark = pytest.mark.skipif(not BUSYBOX, reason="needs busybox-static")


def call(script, *arguments, folder=None):
    """What `script` prints with the agent's functions at hand; its arguments are $1, $2, ..."""
    roots = (
        {f"NODEPOOL_{name.upper()}": str(folder / name) for name in ("sys", "dev", "proc", "state")} if folder else {}
    )
    program = f'set -- functions "$@"\n. {AGENT}/agent.sh\nshift\n{script}'
    done = subprocess.run(
        [BUSYBOX, "sh", "-c", program, "sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin", **roots},
    )
    assert not done.stderr, done.stderr
    return done.stdout


def put(folder, path, content=""):
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def disk(folder, name, size=2048, **files):
    put(folder, f"sys/block/{name}/size", f"{size}\n")
    put(folder, f"sys/block/{name}/device/uevent")
    for path, content in files.items():
        put(folder, f"sys/block/{name}/{path.replace('__', '/')}", content)


@pytest.mark.parametrize("name", ["init.sh", "agent.sh", "dhcp.sh"])
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_the_programs_are_sound_posix_sh(name):
    done = subprocess.run(["shellcheck", "--shell=sh", AGENT / name], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("value", STRANGE)
def test_values_are_encoded_as_everybody_does(value):
    assert call('encode "$1"', value) == quote(value, safe="-._~")


@pytest.mark.parametrize("value", STRANGE)
def test_values_are_decoded_as_everybody_does(value):
    assert call('decode "$1"', quote(value, safe="")) == value


@pytest.mark.parametrize("text", ["100%", "%", "%4", "%zz%4g", "%%41", "%e2%98%83"])
def test_what_is_not_encoded_stays(text):
    assert call('decode "$1"', text) == unquote(text)


def test_a_body_is_read_by_key_and_never_run(tmp_path):
    put(tmp_path, "body", "operation=7\nhostname=%24%28touch%20pwned%29\nop.er=x\nurl=http%3A%2F%2Fa%2F%3Fb%3Dc\n")

    assert call(
        f'value {tmp_path}/body hostname; echo; value {tmp_path}/body url; echo; value {tmp_path}/body "no"'
    ) == ("$(touch pwned)\nhttp://a/?b=c\n")


def test_a_word_of_the_kernels_command_line_is_the_last_of_its_name(tmp_path):
    put(tmp_path, "proc/cmdline", "quiet nodepool.token=old xnodepool.token=no nodepool.token=abc console=ttyS0\n")

    assert call("word nodepool.token", folder=tmp_path) == "abc\n"


def test_disks_are_listed_as_the_kernel_counts_them_and_only_whole_ones_of_hardware(tmp_path):
    for name in ("sdb", "sdaa", "sda", "nvme0n1", "vda", "mmcblk0"):
        disk(tmp_path, name)
    for name in ("loop0", "ram1", "sr0", "dm-0", "md127", "zram0", "mmcblk0boot0"):
        disk(tmp_path, name)
    put(tmp_path, "sys/block/sdz/size", "2048\n")  # nothing of hardware behind it
    disk(tmp_path, "sdc", size=0, removable="1\n")  # an empty card reader
    disk(tmp_path, "sdd", removable="1\n", ro="1\n")  # the BMC's virtual medium
    disk(tmp_path, "nvme0c0n1", hidden="1\n")  # one path of a multipath disk
    disk(tmp_path, "sde", removable="1\n", ro="0\n")  # a stick that can be written is a disk

    assert call("disks", folder=tmp_path).split() == ["sda", "sdb", "sde", "vda", "sdaa", "mmcblk0", "nvme0n1"]


def test_disks_tell_their_size_serial_and_name_in_the_world(tmp_path):
    disk(
        tmp_path,
        "nvme0n1",
        4096,
        wwid="eui.0025388b01234567\n",
        device__serial="S4EV  \n",
        device__model="SAMSUNG X \n",
    )
    disk(
        tmp_path,
        "sda",
        1,
        device__vpd_pg80=b"\0\x80\0\x0a  ZA12 34\0",
        device__wwid="naa.5000c500\n",
        queue__rotational="1\n",
    )
    disk(tmp_path, "vda", 1, serial=b"DISK0\0\0")
    told = dict(line.split("=", 1) for line in call("disk_facts", folder=tmp_path).splitlines())

    assert [told[f"disk.{n}.name"] for n in range(3)] == ["sda", "vda", "nvme0n1"]
    assert [told[f"disk.{n}.serial"] for n in range(3)] == ["ZA12%2034", "DISK0", "S4EV"]
    assert [told[f"disk.{n}.size"] for n in range(3)] == ["512", "512", str(4096 * 512)]
    assert (told["disk.0.wwn"], told["disk.0.rotational"]) == ("naa.5000c500", "1")
    assert (told["disk.2.wwn"], told["disk.2.model"]) == ("eui.0025388b01234567", "SAMSUNG%20X")


def test_what_the_firmware_tells_is_a_fact(tmp_path):
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nprocessor\t: 1\n")
    put(tmp_path, "proc/meminfo", "MemTotal:        8388608 kB\n")
    put(tmp_path, "sys/firmware/efi/systab")
    put(tmp_path, "sys/class/dmi/id/product_uuid", "4C4C4544-0042-3510-8051-B7C04F4E3732\n")
    put(tmp_path, "sys/class/dmi/id/sys_vendor", "Dell Inc.\n")
    told = dict(line.split("=", 1) for line in call("facts", folder=tmp_path).splitlines())

    assert told["fact.cpus"] == "2"
    assert told["fact.memory"] == str(8 << 30)
    assert told["fact.firmware"] == "uefi"
    assert told["fact.uuid"] == "4c4c4544-0042-3510-8051-b7c04f4e3732"
    assert told["fact.vendor"] == "Dell%20Inc."
    assert told["fact.serial"] == ""


def test_how_far_the_work_is_adds_up_all_its_meters(tmp_path):
    put(tmp_path, "meter.vda", "1000\n")
    put(tmp_path, "meter.vda.log", "\r52 bytes copied, 1 s\r7340032 bytes (7.3 MB, 7.0 MiB) copied, 2 s, 3.7 MB/s")
    put(tmp_path, "meter.vdb.log", "")

    assert call(f"metered {tmp_path}") == "7341032\n"


def test_a_tools_last_words_leave_out_its_figures(tmp_path):
    put(
        tmp_path,
        "log",
        "\r1048576 bytes (1 MB) copied\r\ndd: error writing '/dev/vda': No space left\n1+0 records in\n",
    )

    assert call(f"last_words {tmp_path}/log") == "dd: error writing '/dev/vda': No space left\n"


def erase(folder, change):
    """Erase one disk with old bytes on it, the kernel's answer to it changed; the method, or why it failed."""
    disk(folder, "vda", size=4096)
    put(folder, "dev/vda", b"\xaa" * 4096 * 512)
    put(folder, "op/instruction", "kind=erase\n")
    for name in ("state", "proof"):
        (folder / name).mkdir()
    call(f"exec 2>/dev/null; PROOF={folder}/proof OP={folder}/op; {change}; (erase_disk vda)", folder=folder)
    return (folder / "op/method.vda").read_text() if (folder / "op/method.vda").exists() else ""


def test_a_disk_that_says_it_is_zero_and_is_not_is_written_over(tmp_path):
    assert erase(tmp_path, "blkdiscard() { :; }") == "zero"
    assert (tmp_path / "dev/vda").read_bytes() == bytes(4096 * 512)


def test_a_disk_that_was_told_and_has_done_so_is_not_written_again(tmp_path):
    obeys = 'blkdiscard() { dd if=/dev/zero of="$DEV/vda" bs=1M count=2 conv=notrunc; }; zero_by_writing() { exit 9; }'

    assert erase(tmp_path, obeys) == "blkdiscard"


def test_one_byte_that_stays_is_a_failed_erase_and_the_disk_does_not_count_as_erased(tmp_path):
    keeps = 'zero_by_writing() { truncate -s 0 "$DEV/vda"; truncate -s 2097151 "$DEV/vda"; printf x >>"$DEV/vda"; }'

    assert erase(tmp_path, keeps) == ""
    assert "code=disk-erase" in (tmp_path / "op/result").read_text()
    assert not (tmp_path / "state/erased.vda").exists()


def test_a_disk_that_ends_early_is_a_failed_erase(tmp_path):
    ends = 'zero_by_writing() { truncate -s 0 "$DEV/vda"; truncate -s 2093056 "$DEV/vda"; }'

    assert erase(tmp_path, ends) == ""
    assert "2093056" in (tmp_path / "op/result").read_text()


def test_boot_entries_on_disks_are_told_from_those_of_cards_and_of_the_firmware_itself(tmp_path):
    listed = tmp_path / "entries"
    listed.write_text(
        "BootCurrent: 0003\nTimeout: 0 seconds\nBootOrder: 000A,0003,0000\n"
        "Boot0000* UiApp\tFvVol(7cb8bdc9)/FvFile(462caa21)\n"
        "Boot0001* UEFI Misc Device\tPciRoot(0x0)/Pci(0x2,0x0)N.....YM....R,Y.\n"
        "Boot0003* UEFI PXEv4\tPciRoot(0x0)/Pci(0x1,0x0)/MAC(525400000002,1)/IPv4(0.0.0.00.0.0.0,0,0)\n"
        "Boot000A* nodepool\tHD(2,GPT,5A9D7F2E-0001-4C5B-9E3B-0F1E2D3C4B5A,0x1000,64)/File(\\EFI\\BOOT\\BOOTX64.EFI)\n"
        "Boot000B  debian\tHD(1,MBR,0x1f2e3d4c,0x800,0x100000)/File(\\EFI\\debian\\shimx64.efi)\n"
    )
    assert call('disk_entries <"$1"', str(listed)).splitlines() == [
        "000a 5a9d7f2e-0001-4c5b-9e3b-0f1e2d3c4b5a",
        "000b 0x1f2e3d4c",
    ]
