"""Running diskimage-builder: its command, its environment, what its log says of progress and of failure."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nodepool.config.records import DiskImage
from nodepool.errors import Code, Permanent
from nodepool.image import apt
from nodepool.image.process import Work, execute
from nodepool.image.tools import lacking, sentence_of_missing

ELEMENTS = Path(__file__).resolve().parent.parent / "elements"  # this project's own
DIB_COMMAND = "disk-image-create"

# Where each phase begins in a build, as a share of all of diskimage-builder's time: measured with debian-minimal and
# nodepool-node (45 s: root.d 28, install.d 10).  Phases in their order; one that is not named here moves nothing.
PHASES = {
    "root": 0.0,
    "extra-data": 0.6,
    "pre-install": 0.61,
    "install": 0.64,
    "post-install": 0.88,
    "post-root": 0.89,
    "block-device": 0.9,
    "pre-finalise": 0.92,
    "finalise": 0.93,
    "cleanup": 0.95,
}
_RUNNING = re.compile(r"dib-run-parts Running \S*/(?P<phase>[a-z-]+)\.d/(?P<script>\S+)")
# debootstrap fetches, unpacks and sets up some 90 packages, four lines each; that is three quarters of its phase.
_BOOTSTRAP = re.compile(r"I: (Retrieving|Extracting|Unpacking|Configuring) ")
_BOOTSTRAP_LINES, _BOOTSTRAP_SHARE = 360, 0.45
_TO_INSTALL = re.compile(r"(\d+) newly installed")
_INSTALLING = re.compile(r"(?:^|[> |])(?:Unpacking|Setting up) \S+ \(")
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d [\d:.]+ \| ")
_TELLING = re.compile(
    r"^(> )?(E: |W: Failed|ERROR|.*\b(error|fatal|failed|cannot|unable|not found|no such|missing)\b)", re.IGNORECASE
)
_NOISE = re.compile(
    r"PROFILING|dib-run-parts|returncode|failed with returncode|umount|Unable to locate.*warning"
    r"|^\s*$|perl: warning|debconf: |Suggested|Recommended|Get:|Unpacking|Setting up|Selecting|Preparing"
)


@dataclass(slots=True)
class Reader:
    """Follows diskimage-builder's log line by line: where it is, and the share of its whole that is done."""

    report: Callable[[str, float | None], None]
    where: str = ""  # e.g. install.d/01-package-installs
    share: float = 0.0
    _expected: int = 0
    _done: int = 0
    _end: float = 0.0  # of the phase
    _span: tuple[float, float] = (0.0, 0.0)  # of what is counted now
    _told: tuple[str, int] = field(default=("", -1))

    def line(self, text: str) -> None:
        """Take in one line of the log."""
        if match := _RUNNING.search(text):
            phase = match["phase"]
            self.where = f"{phase}.d/{match['script']}"
            if phase in PHASES:
                later = [start for start in PHASES.values() if start > PHASES[phase]]
                self._end = min(later, default=1.0)
                self.share = max(self.share, PHASES[phase])
            self._expected = self._done = 0
        elif match := _TO_INSTALL.search(text):
            self._expect(2 * int(match[1]), self._end)  # each package is unpacked and set up
        elif _BOOTSTRAP.search(text):
            if not self._expected:
                self._expect(_BOOTSTRAP_LINES, _BOOTSTRAP_SHARE)
            self._advance()
        elif self._expected and _INSTALLING.search(text):
            self._advance()
        else:
            return
        self._tell()

    def _expect(self, lines: int, end: float) -> None:
        """So many lines of work lead from where we are to the share `end`."""
        self._expected, self._done = lines, 0
        self._span = (self.share, max(self.share, end))

    def _advance(self) -> None:
        self._done += 1
        start, end = self._span
        self.share = max(self.share, start + (end - start) * min(1.0, self._done / self._expected))

    def _tell(self) -> None:
        phase = self.where.partition("/")[0]
        now = (phase, int(self.share * 100))
        if phase and now != self._told:
            self._told = now
            self.report(phase, self.share)


def command_words(dib_cmd: str) -> list[str]:
    """`dib-cmd` as words; it may put something before disk-image-create, such as `nsenter --net=...`.

    disk-image-create is also found beside this Python, where `pip install` puts it.  Raises `Permanent` with the remedy
    when the command does not exist.
    """
    words = shlex.split(dib_cmd)
    if not words:
        raise Permanent("dib-cmd is empty: leave it out, or name the command", Code.IMAGE_BUILD)
    beside = Path(sys.executable).parent / DIB_COMMAND
    if words[-1] == DIB_COMMAND and not shutil.which(DIB_COMMAND) and beside.exists():
        words[-1] = str(beside)
    for word in {words[0], words[-1]}:
        if not shutil.which(word):
            remedy = "pip install diskimage-builder" if word == DIB_COMMAND else "correct dib-cmd in the YAML"
            raise Permanent(f"there is no command {word}: {remedy}", Code.IMAGE_BUILD)
    return words


def missing_tools(image: DiskImage) -> dict[str, str]:
    """What diskimage-builder itself lacks on this machine: tool -> Debian package.  Other builders are not judged."""
    words = shlex.split(image.dib_cmd)
    if not words or Path(words[-1]).name != DIB_COMMAND:
        return {}
    needed = {"sudo": "sudo", "losetup": "mount", "mkfs.ext4": "e2fsprogs"}
    if any(element.endswith(("-minimal", "debootstrap")) for element in image.elements):
        needed["debootstrap"] = "debootstrap"
    if image.assembly == "dib":
        needed["qemu-img"] = "qemu-utils"
        if "vm" in image.elements:
            needed["kpartx"] = "kpartx"
    return lacking(needed)


def environment(
    image: DiskImage, elements_dir: Path | None, scratch: Path, host: apt.Host, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a build: the host's mirrors, over them `base`, and the YAML's env-vars on top.

    `base` is the daemon's own environment; its NODEPOOL_ variables may be secrets and stay out, for diskimage-builder
    writes its environment into the image.
    """
    own = [str(elements_dir.resolve())] if elements_dir else []
    env = _mirrors(image, host)
    env |= {name: value for name, value in base.items() if not name.startswith("NODEPOOL_")}
    env |= {
        "ELEMENTS_PATH": os.pathsep.join([*own, str(ELEMENTS)]),
        "DIB_IMAGE_CACHE": str(scratch.parent / ".cache"),  # packages are fetched once for all builds
        "DIB_CHECKSUM": "0",
        "TMP_DIR": str(scratch),
        "PATH": os.pathsep.join([base.get("PATH", os.defpath), str(Path(sys.executable).parent), "/usr/sbin", "/sbin"]),
    }
    if image.release:
        env["DIB_RELEASE"] = image.release
    return env | dict(image.env_vars)


def _mirrors(image: DiskImage, host: apt.Host) -> dict[str, str]:
    for family in apt.FAMILIES:
        if any(element == family or element.startswith(f"{family}-") for element in image.elements):
            return apt.environment(host, family, image.env_vars.get("DIB_RELEASE", image.release))
    return {}


def build_root(
    work: Work, image: DiskImage, out: Path, elements_dir: Path | None, progress: Callable[[str, float | None], None]
) -> Path:
    """Run diskimage-builder for `image` and give the path of what it made: a tar of the root, or the raw disk.

    `out` is that path without its suffix; its folder is scratch space too.  `progress` hears of each phase (`root.d`,
    `install.d`, ...) with the share done.  Raises `Permanent` (image-build) with the last telling lines of the log.
    """
    if lacks := missing_tools(image):
        raise Permanent(sentence_of_missing(lacks), Code.IMAGE_BUILD)
    kind = "raw" if image.assembly == "dib" else "tar"
    words = command_words(image.dib_cmd)
    skip_base = ["-n"] if any(element.endswith("-minimal") for element in image.elements) else []
    command = [*words, *skip_base, "-t", kind, "-o", str(out), *image.elements]
    env = environment(image, elements_dir, out.parent, apt.read_host(), os.environ)
    reader = Reader(progress)
    tail: list[str] = []

    def on_line(line: str) -> None:
        tail.append(line)
        del tail[:-400]
        reader.line(line)

    status = execute(work, command, env, on_line)
    made = out.with_name(f"{out.name}.{kind}")
    if status:
        raise Permanent(failure(status, reader.where, tail, work.log), Code.IMAGE_BUILD)
    if not made.exists():
        raise Permanent(f"{words[-1]} ended well and made no {made.name}; log: {work.log}", Code.IMAGE_BUILD)
    return made


def failure(status: int, where: str, tail: Iterable[str], log: Path) -> str:
    """A failed build in a sentence: where, the last telling lines (at most three), and the log."""
    place = f" in {where}" if where else ""
    end = f"status {status}" if status >= 0 else f"signal {-status}"
    return f"diskimage-builder failed with {end}{place}: {'; '.join(telling(tail)) or 'it said nothing'}; log: {log}"


def telling(tail: Iterable[str], count: int = 3) -> list[str]:
    """The last lines of a log that sound like the reason; the last lines at all when none does."""
    lines = [_STAMP.sub("", line).strip() for line in tail]
    lines = [line.removeprefix("> ")[:300] for line in lines if line and not _NOISE.search(line)]
    chosen = [line for line in lines if _TELLING.match(line)] or lines
    return list(dict.fromkeys(chosen))[-count:]
