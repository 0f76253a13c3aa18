"""Where this machine gets its packages from, read from its own apt configuration at run time.

An image is built from the mirrors that the building machine uses: they are near, and often the only ones it can reach.
Formats: sources.list(5), one-line style and deb822 style.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

FAMILIES = ("debian", "ubuntu")
_ONE_LINE = re.compile(r"^(deb|deb-src)\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>.*)$")
_USABLE = ("http", "https")  # schemes that a chroot without the machine's files can use


@dataclass(frozen=True, slots=True)
class Source:
    """One archive of binary packages: `deb [options] uri suite components...`; option names in lower case."""

    uri: str
    suite: str
    components: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Host:
    """What matters of this machine for a build: its family (`debian`, `ubuntu`, ...), release, and apt's settings."""

    family: str
    release: str
    sources: tuple[Source, ...]
    settings: Mapping[str, str] = field(default_factory=dict)  # of `apt-config dump`, names in lower case


def read_host(etc: Path = Path("/etc")) -> Host:
    """This machine's own; without apt there are no sources, and diskimage-builder's defaults apply."""
    release: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (etc / "os-release").read_text(errors="replace").splitlines():
            name, _, value = line.partition("=")
            release[name] = value.strip().strip("\"'")
    return Host(release.get("ID", ""), release.get("VERSION_CODENAME", ""), read_sources(etc / "apt"), _settings())


def read_sources(folder: Path) -> tuple[Source, ...]:
    """All enabled archives of `folder` (/etc/apt), in apt's order; files that cannot be read are passed over."""
    paths = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    found: list[Source] = []
    for path in paths:
        with contextlib.suppress(OSError):
            if path.suffix == ".list":
                found += parse_list(path.read_text(errors="replace"))
            elif path.suffix == ".sources":
                found += parse_deb822(path.read_text(errors="replace"))
    return tuple(found)


def parse_list(text: str) -> tuple[Source, ...]:
    """The archives of a file in one-line style."""
    found = []
    for line in text.splitlines():
        match = _ONE_LINE.match(line.partition("#")[0].strip())
        if match and match[1] == "deb":
            words = (word.partition("=") for word in (match["options"] or "").split())
            options = {name.rstrip("+-").lower(): value for name, _, value in words}
            found.append(Source(match["uri"], match["suite"], tuple(match["rest"].split()), options))
    return tuple(found)


def parse_deb822(text: str) -> tuple[Source, ...]:
    """The archives of a file in deb822 style: stanzas of fields, one archive for each URI with each suite."""
    return tuple(source for stanza in _stanzas(text) for source in _archives(stanza))


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    stanza: dict[str, str] = {}
    last = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if stanza:
                yield stanza
            stanza, last = {}, ""
        elif line[0] in " \t":
            if last:
                stanza[last] += "\n" + line.strip()
        else:
            name, _, value = line.partition(":")
            last = name.strip().lower()
            stanza[last] = value.strip()


def _archives(stanza: Mapping[str, str]) -> Iterator[Source]:
    if "deb" not in stanza.get("types", "").split() or stanza.get("enabled", "yes").lower() in {"no", "false", "0"}:
        return
    own = {"types", "uris", "suites", "components", "enabled"}
    options = {name: value for name, value in stanza.items() if name not in own}
    if "architectures" in options:
        options["arch"] = ",".join(options.pop("architectures").split())
    for uri in stanza.get("uris", "").split():
        for suite in stanza.get("suites", "").split():
            yield Source(uri, suite, tuple(stanza.get("components", "").split()), options)


def environment(host: Host, family: str, release: str) -> dict[str, str]:
    """What diskimage-builder is told about mirrors for an image of `family` and `release` (empty: the host's own).

    Empty when this machine has no archive of that family: diskimage-builder's own defaults apply then.
    """
    release = release or (host.release if host.family == family else "")
    base = _base(host, family, release)
    if base is None:
        return {}
    # The root element of either family, debootstrap, reads the components from the variable that says Debian.
    env = {"DIB_DISTRIBUTION_MIRROR": base.uri.rstrip("/"), "DIB_DEBIAN_COMPONENTS": ",".join(base.components)}
    security = _security(host, base, release)
    if security and family == "debian":
        env["DIB_DEBIAN_SECURITY_MIRROR"] = security.uri.rstrip("/")
    if not _is_public_key(base.options.get("signed-by", ""), family):
        env["DIB_APT_KEYRING"] = base.options["signed-by"]
    if base.uri.startswith("https:"):  # the bootstrapped system speaks TLS only when it knows authorities
        env["DIB_DEBOOTSTRAP_EXTRA_ARGS"] = env["DIB_MMDEBSTRAP_EXTRA_ARGS"] = "--include=ca-certificates"
    return env | _proxies(host.settings) | _validity(host.settings)


def _base(host: Host, family: str, release: str) -> Source | None:
    """The family's main archive here: of the very release, else any when the machine is of the family itself."""
    usable = [source for source in host.sources if _usable(source) and not re.search(r"-|/", source.suite)]
    exact = [source for source in usable if source.suite == release]
    likely = sorted(exact, key=lambda source: _likeness(source, family), reverse=True)
    if likely and (host.family == family or _likeness(likely[0], family)):
        return likely[0]
    if host.family != family:
        return None
    return max(usable, key=lambda source: _likeness(source, family), default=None)


def _usable(source: Source) -> bool:
    return urlsplit(source.uri).scheme in _USABLE and "main" in source.components


def _likeness(source: Source, family: str) -> int:
    """How much an archive looks like the distribution's own, not a third party's with the same words."""
    path = urlsplit(source.uri).path.rstrip("/")
    signed = f"{family}-archive-keyring" in source.options.get("signed-by", "")
    return 2 * (path.rsplit("/", 1)[-1] == family) + signed


def _security(host: Host, base: Source, release: str) -> Source | None:
    """Debian's security archive of this machine; that of another release serves too."""
    found = [source for source in host.sources if _usable(source) and source.suite.endswith("-security")]
    exact = [source for source in found if source.suite == f"{release}-security"]
    other = [source for source in found if source.uri != base.uri]
    return next(iter([*exact, *other]), None)


def _is_public_key(signed_by: str, family: str) -> bool:
    """Does every system of the family know the signer?  Keys written into the file cannot be handed on."""
    return not signed_by.startswith("/") or f"{family}-archive" in signed_by


def _settings() -> dict[str, str]:
    """`apt-config dump` as a mapping; empty where there is no apt."""
    try:
        done = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_settings(done.stdout)


def parse_settings(dump: str) -> dict[str, str]:
    """The lines `Name::Of::It "value";` of `apt-config dump`."""
    found = (re.match(r'^(\S+) "(.*)";$', line) for line in dump.splitlines())
    return {match[1].lower(): match[2] for match in found if match and match[2]}


def _proxies(settings: Mapping[str, str]) -> dict[str, str]:
    env = {}
    for scheme in _USABLE:
        proxy = settings.get(f"acquire::{scheme}::proxy", "")
        if proxy and proxy.upper() != "DIRECT":
            env[f"{scheme}_proxy"] = proxy
    direct = [name.rsplit("::", 1)[-1] for name, value in settings.items() if "::proxy::" in name and value == "DIRECT"]
    if env and direct:
        env["no_proxy"] = ",".join(direct)
    return env


def _validity(settings: Mapping[str, str]) -> dict[str, str]:
    """Mirrors of a moment in the past have expired lists: where this machine accepts them, so does the build."""
    names = {"acquire::check-valid-until": "Acquire::Check-Valid-Until", "acquire::check-date": "Acquire::Check-Date"}
    lines = [f'{name} "false";' for key, name in names.items() if settings.get(key, "").lower() in {"false", "no", "0"}]
    return {"DIB_NODEPOOL_APT_CONF": "\n".join(lines)} if lines else {}
