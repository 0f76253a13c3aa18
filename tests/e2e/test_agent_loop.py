"""The agent as a real process of this system, with folders for /sys, /dev and /proc and files for disks.

No machine, no root: what needs real devices is in test_agent_vm.py.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from agent_server import Daemon, wait_until

AGENT = Path(__file__).parents[2] / "nodepool/agent/agent.sh"
BUSYBOX = shutil.which("busybox")
MIB = 1024 * 1024

pytestmark = pytest.mark.skipif(not BUSYBOX, reason="needs busybox-static")


class Machine:
    """Folders that look like a machine with two disks, and the agent running on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "dev/vda"
        for name in ("dev", "state", "proof", "sys/class/net/eth0/device", "sys/class/dmi/id"):
            (folder / name).mkdir(parents=True)
        (folder / "sys/class/net/eth0/address").write_text("52:54:00:00:00:01\n")
        (folder / "sys/class/dmi/id/product_name").write_text("Fake & Sons\n")
        (folder / "proc/sys/kernel/random").mkdir(parents=True)
        for name in ("cpuinfo", "meminfo", "uptime", "sys/kernel/random/boot_id"):
            (folder / "proc" / name).symlink_to(f"/proc/{name}")
        self.add_disk("vda", 8 * MIB)

    def add_disk(self, name, size):
        (self.folder / f"sys/block/{name}/device").mkdir(parents=True)
        (self.folder / f"sys/block/{name}/size").write_text(f"{size // 512}\n")
        (self.folder / f"dev/{name}").write_bytes(b"\xaa" * size)

    def add_stuck_disk(self):
        """A disk that never answers: nobody reads the FIFO."""
        (self.folder / "sys/block/vdb/device").mkdir(parents=True)
        (self.folder / "sys/block/vdb/size").write_text("2048\n")
        os.mkfifo(self.folder / "dev/vdb")
        return "vdb"

    def start(self, url, token):
        (self.folder / "proc/cmdline").write_text(f"quiet nodepool.url={url} nodepool.token={token} console=ttyS0\n")
        settings = {"SYS": "sys", "DEV": "dev", "PROC": "proc", "STATE": "state", "PROOF": "proof"}
        environment = {f"NODEPOOL_{key}": str(self.folder / value) for key, value in settings.items()}
        environment |= {"NODEPOOL_REPORT_EVERY": "1", "NODEPOOL_PATIENCE": "2", "NODEPOOL_PIECE": str(MIB)}
        environment["NODEPOOL_REBOOT"] = f"touch {self.folder}/rebooted"
        with (self.folder / "console.log").open("wb") as console:
            self._process = subprocess.Popen(
                [BUSYBOX, "sh", str(AGENT)],
                env={"PATH": os.environ["PATH"], **environment},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )

    def console(self):
        return (self.folder / "console.log").read_text()

    def wait_for_words(self, words):
        wait_until(lambda: words in self.console(), 30, self.console)

    def wait_for_restart(self):
        wait_until((self.folder / "rebooted").exists, 30, self.console)

    def stop(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pid in self.folder.glob("state/*/pid"):  # workers have a session of their own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


def living(group):
    """The processes of a process group that have not ended (stat's third field is the state, its fifth the group)."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            stats.append(path.read_text().rpartition(")")[2].split())
    return [fields for fields in stats if int(fields[2]) == group and fields[0] != "Z"]


@pytest.fixture
def daemon():
    with Daemon(socket.create_server(("127.0.0.1", 0)), hold=1.0) as server:
        yield server


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def agent(machine, daemon):
    machine.start(daemon.url, daemon.token)
    yield machine
    machine.stop()


@pytest.fixture
def image(daemon):
    content = os.urandom(2 * MIB) + bytes(MIB) + os.urandom(MIB // 2)
    daemon.files["/image"] = content
    sha256 = hashlib.sha256(content).hexdigest()
    return {"url": f"{daemon.url}/image", "size": len(content), "sha256": sha256, "encoding": "raw", "device": "vda"}


def test_hello_tells_what_the_machine_is(agent, daemon):
    told = daemon.wait_for(lambda: daemon.hellos)[0]

    assert told["version"] == "1"
    assert told["token"] == daemon.token
    assert len(told["nonce"]) == 32
    assert told["fact.product"] == "Fake & Sons"
    assert told["fact.firmware"] == "bios"
    assert (told["nic.0.name"], told["nic.0.mac"]) == ("eth0", "52:54:00:00:00:01")
    assert (told["disk.0.name"], told["disk.0.size"]) == ("vda", str(8 * MIB))


def test_a_daemon_that_cannot_say_now_is_asked_again_with_the_same_nonce(machine, daemon):
    daemon.answers = [(503, {"error": "starting", "wait": 0}), (500, {"error": "oops"})]
    machine.start(daemon.url, daemon.token)
    try:
        daemon.wait_for(lambda: daemon.reports)
    finally:
        machine.stop()

    assert len(daemon.hellos) == 3
    assert len({hello["nonce"] for hello in daemon.hellos}) == 1


def test_a_spent_token_is_said_on_the_console_and_nothing_more_is_asked(machine, daemon):
    daemon.answers = [(409, {"error": "spent by 52:54:00:99:99:99"})]
    machine.start(daemon.url, daemon.token)
    try:
        machine.wait_for_words("spent by 52:54:00:99:99:99")
    finally:
        machine.stop()

    assert len(daemon.hellos) == 1
    assert not daemon.reports


def test_an_agent_whose_version_is_no_longer_served_restarts_the_machine(machine, daemon):
    daemon.answers = [(426, {"error": "version 1 is no longer served"})]
    machine.start(daemon.url, daemon.token)
    try:
        machine.wait_for_restart()
    finally:
        machine.stop()

    assert not daemon.reports


def test_erase_zeroes_every_disk_and_says_how(agent, daemon):
    agent.add_disk("sdb", 3 * MIB)
    (agent.folder / "sys/block/loop0").mkdir()

    told = daemon.carry_out("erase", level="default")

    assert told["state"] == "done", told
    assert told["result.disks"] == "sdb,vda"
    assert told["result.method.vda"] == "zero"  # a file cannot be told to be zero; it was written
    assert agent.disk.read_bytes() == bytes(8 * MIB)
    assert (agent.folder / "dev/sdb").read_bytes() == bytes(3 * MIB)


def test_a_machine_without_a_disk_cannot_be_erased(agent, daemon):
    shutil.rmtree(agent.folder / "sys/block/vda")

    assert daemon.carry_out("erase", level="default")["code"] == "disk-missing"


def test_write_puts_the_image_on_the_disk_over_what_was_there(agent, daemon, image):
    told = daemon.carry_out("write", **image)

    assert (told["state"], told.get("result.sha256")) == ("done", image["sha256"]), told
    assert told["result.written"] == str(image["size"])
    assert agent.disk.read_bytes()[: image["size"]] == daemon.files["/image"]


def test_write_after_erase_leaves_the_holes_to_the_zeros_that_are_there(agent, daemon, image):
    daemon.carry_out("erase", level="default")
    told = daemon.carry_out("write", **image)

    assert told["state"] == "done", told
    assert agent.disk.read_bytes() == daemon.files["/image"].ljust(8 * MIB, b"\0")


def test_holes_are_zeros_though_the_disk_was_written_since_it_was_erased(agent, daemon, image):
    daemon.carry_out("erase", level="default")
    daemon.carry_out("write", **image)
    content = bytes(image["size"] - 4096) + bytes(range(256)) * 16
    daemon.files["/image"] = content
    told = daemon.carry_out("write", **{**image, "sha256": hashlib.sha256(content).hexdigest()})

    assert told["state"] == "done", told
    assert agent.disk.read_bytes()[: image["size"]] == content


def test_a_compressed_image_is_unpacked_on_its_way(agent, daemon, image):
    content = daemon.files["/image"]
    daemon.files["/image.zst"] = subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True).stdout
    told = daemon.carry_out("write", **{**image, "url": f"{daemon.url}/image.zst", "encoding": "zstd"})

    assert told["state"] == "done", told
    assert agent.disk.read_bytes()[: image["size"]] == content


def test_a_compressed_image_that_is_damaged_is_unreadable(agent, daemon, image):
    packed = subprocess.run(["zstd", "-qc"], input=daemon.files["/image"], capture_output=True, check=True).stdout
    daemon.files["/image.zst"] = packed[: len(packed) // 2]
    told = daemon.carry_out("write", **{**image, "url": f"{daemon.url}/image.zst", "encoding": "zstd"})

    assert told["code"] == "image-unreadable", told


def test_an_altered_byte_is_the_images_fault(agent, daemon, image):
    altered = bytearray(daemon.files["/image"])
    altered[MIB + 17] ^= 1
    daemon.files["/image"] = bytes(altered)
    told = daemon.carry_out("write", **image)

    assert told["code"] == "image-altered", told
    assert image["sha256"] in told["error"]


def test_other_bytes_on_the_disk_than_on_the_wire_are_the_disks_fault(agent, daemon, image):
    good = daemon.files["/image"]
    bad = good[:-1] + bytes([good[-1] ^ 1])
    served = []

    def first_bad_then_good():  # stands for a disk that keeps other bytes than it was given
        served.append(1)
        return bad if len(served) <= 5 else good

    daemon.files["/image"] = first_bad_then_good
    told = daemon.carry_out("write", **image)

    assert told["code"] == "disk-readback", told


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(agent, daemon, image):
    told = daemon.carry_out("write", **image, min_size=8 * MIB + 1)

    assert told["code"] == "disk-too-small"
    assert not daemon.requests
    assert agent.disk.read_bytes() == b"\xaa" * 8 * MIB


def test_an_image_of_another_length_is_refused_before_a_byte_is_written(agent, daemon, image):
    told = daemon.carry_out("write", **{**image, "size": image["size"] - 512})

    assert told["code"] == "image-altered"
    assert agent.disk.read_bytes() == b"\xaa" * 8 * MIB


def test_a_disk_that_is_not_there_is_missing(agent, daemon, image):
    told = daemon.carry_out("write", **{**image, "device": "../sdz"})

    assert told["code"] == "disk-missing"


def test_an_image_that_the_server_does_not_have_is_a_failed_transfer(agent, daemon, image):
    told = daemon.carry_out("write", **{**image, "url": f"{daemon.url}/other"})

    assert told["code"] == "transfer"
    assert "status 404" in told["error"]


def test_a_server_that_stays_away_is_a_failed_transfer_with_the_clients_own_words(agent, daemon, image):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    told = daemon.carry_out("write", **{**image, "url": f"http://127.0.0.1:{port}/image"})

    assert told["code"] == "transfer"
    assert "connect" in told["error"]


def test_a_piece_that_breaks_off_is_fetched_again(agent, daemon, image):
    class BreaksOffOnce(bytes):
        broken = False

        def __getitem__(self, part):
            if part.start == MIB and not BreaksOffOnce.broken:
                BreaksOffOnce.broken = True
                raise ConnectionError("the cable is out")
            return bytes(self)[part]

    daemon.files["/image"] = BreaksOffOnce(daemon.files["/image"])
    told = daemon.carry_out("write", **image)

    assert BreaksOffOnce.broken
    assert told["state"] == "done", told


def test_work_that_goes_on_is_reported_and_can_be_cancelled(agent, daemon, image):
    daemon.files["/image"] = b"x" * 512
    number = daemon.give("write", **{**image, "size": 512, "device": agent.add_stuck_disk()})
    running = daemon.wait_for(lambda: next((r for r in daemon.reports if r.get("state") == "running"), None))
    daemon.cancel(number)
    agent.wait_for_words("cancelled")
    told = daemon.carry_out("write", **{**image, "device": "vda", "size": 512, "sha256": "0" * 64})

    assert (running["operation"], running["phase"], running["total"]) == (number, "write", "512")
    assert told["state"] == "failed"  # the agent works on
    assert not [r for r in daemon.reports if r.get("operation") == number and r["state"] != "running"]


def test_an_operation_that_is_told_again_is_reported_again_and_not_done_again(agent, daemon, image):
    told = daemon.carry_out("write", **image)
    agent.disk.write_bytes(b"\xbb" * 8 * MIB)
    daemon.repeat(told["operation"])

    assert daemon.wait_for_end(told["operation"]) == told
    assert agent.disk.read_bytes() == b"\xbb" * 8 * MIB


def test_a_report_is_repeated_until_it_is_heard(agent, daemon):
    daemon.deaf = 1
    told = daemon.carry_out("start", method="magic", device="vda")
    ends = [report for report in daemon.reports if report.get("state") == "failed"]
    daemon.wait_for(lambda: not daemon.deaf and [r for r in daemon.reports if r.get("state") == "failed"][1:])

    assert told["code"] == "agent-error"
    assert ends[0] == told


def test_start_is_reported_before_the_machine_goes_down(agent, daemon):
    told = daemon.carry_out("start", method="reboot", device="vda")
    agent.wait_for_restart()

    assert told["state"] == "done"


def test_a_boot_that_is_over_stops_the_work_and_silences_the_agent(agent, daemon, image):
    daemon.files["/image"] = b"x" * 512
    number = daemon.give("write", **{**image, "size": 512, "device": agent.add_stuck_disk()})
    daemon.wait_for(lambda: [r for r in daemon.reports if r.get("state") == "running"])
    worker = int((agent.folder / "state" / number / "pid").read_text())
    daemon.answers = [(403, {"error": "boot 41 is over"})]
    agent.wait_for_words("boot 41 is over")

    assert not living(worker)


def test_an_unknown_operation_is_refused(agent, daemon):
    told = daemon.carry_out("dance", device="vda")

    assert told["code"] == "agent-error"
    assert "dance" in told["error"]
