"""The phases of a simulated machine's life: how many seconds each lasts when nobody says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nodepool.rack import RackError

# In the order of a deploy.  A power-on and a reboot pass through firmware, a kexec does not.
DEFAULT: Mapping[str, float] = {
    "firmware": 0.5,  # the self test, from power-on to the network boot or the disk
    "ramdisk": 0.3,  # the agent's kernel and ramdisk, until the agent says hello
    "erase": 0.3,
    "write": 0.5,  # the image is fetched and hashed in this time; when that takes longer, so does the phase
    "configure": 0.2,
    "start": 0.1,  # from the report that the agent goes down until it is down
    "system": 0.5,  # the new system, from its loader to its SSH
}
MOST = 86400.0


def told(texts: Iterable[str], base: Mapping[str, float] = DEFAULT) -> dict[str, float]:
    """Seconds per phase: `base` with `PHASE=SECONDS[,PHASE=SECONDS]` applied, `all=SECONDS` for every phase.

    Raises RackError with what is allowed.
    """
    seconds = dict(base)
    for item in (part for text in texts for part in text.split(",") if part.strip()):
        name, _, value = (word.strip() for word in item.partition("="))
        if name not in (*DEFAULT, "all"):
            raise RackError(f"there is no phase {name!r}; the phases are all, {', '.join(DEFAULT)}")
        try:
            lasting = float(value)
        except ValueError:
            lasting = -1.0
        if not 0 <= lasting < MOST:
            raise RackError(f"phase {name} does not take {value!r}; give seconds, e.g. {name}=2.5")
        seconds |= dict.fromkeys(DEFAULT, lasting) if name == "all" else {name: lasting}
    return seconds
