"""What no schema can say: names that are used must exist, and must be given once; pools must add up.

Every check bears with whatever else is wrong in the file, so that one run tells all.  A value that its rule does not
allow was told about by the schema and is passed over here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable

from nodepool.config import addresses, fake, rules
from nodepool.config.common import Declared, chosen
from nodepool.config.problems import Document, Item, Place, top
from nodepool.config.rules import RESERVED, nearest, whole
from nodepool.config.schema import DRIVERS, declared
from nodepool.config.where import WhereError, parse

_COUNT = whole(-1, 1_000_000)
_NAME = rules.name("entry")
_SOME = 5  # names that a sentence lists


def check(doc: Document, secrets: Document | None) -> None:
    """Tell the documents all that is wrong between their parts; `secrets` is None when none was given."""
    root = top(doc)
    networks = by_name(doc, root.items("networks"))
    images = by_name(doc, root.items("diskimages"))
    labels = by_name(doc, root.items("labels"))
    by_name(doc, root.items("providers"))
    _images(doc, images)
    _exposed(doc, root)
    addresses.check_networks(doc, list(root.items("networks")))
    addresses.check_machines(doc, networks)
    _machines(doc, root)
    for provider in root.items("providers"):
        _reference(doc, provider, "network", networks)
        _credentials(doc, provider, secrets)
        _failures(doc, provider)
        _pools(doc, provider, labels, images)
    _capacity(doc, root, labels)
    if secrets is not None:
        by_name(secrets, top(secrets).items("credentials"))
        for entry in by_name(secrets, top(secrets).items("diskimages")).values():
            _known(secrets, entry.at("name"), entry.text("name"), images, "a diskimage of the configuration")


def by_name(doc: Document, items: Iterable[Item]) -> dict[str, Item]:
    """The items by name; a name given again is a problem."""
    result: dict[str, Item] = {}
    for item in items:
        name = item.text("name")
        if not name:
            continue
        if name in result:
            _again(doc, item.at("name"), result[name].at("name"), name)
        else:
            result[name] = item
    return result


def _again(doc: Document, place: Place, first: Place, name: str) -> None:
    doc.problem(
        place, f"found {doc.found(name)} again", f"each name once (it is on line {doc.line(first)}, {doc.path(first)})"
    )


def _known(doc: Document, place: Place, name: str, known: Collection[str], what: str) -> None:
    if not name or name in known:
        return
    names = sorted(filter(_NAME.quietly, known))
    listed = ", ".join(names[:_SOME]) + (" and more" if len(names) > _SOME else "")
    doc.problem(place, f"found {doc.found(name)}", f"{what}: {listed or 'there is none'}{nearest(name, names)}")


def _reference(doc: Document, item: Item, key: str, known: dict[str, Item]) -> None:
    _known(doc, item.at(key), item.text(key), known, f"one of the {key}s")


def _exposed(doc: Document, root: Item) -> None:
    if re.search(r"//[^/:@]*:.+@", root.text("database")):
        doc.warn(root.at("database"), "found a password; it belongs in the secrets file, as database there")


def _images(doc: Document, images: dict[str, Item]) -> None:
    for image in images.values():
        if not image.data.get("elements") and not image.text("dib-cmd"):
            doc.warn(image.at("elements"), "found no elements; disk-image-create makes nothing without one")


def _machines(doc: Document, root: Item) -> None:
    """Over all providers each machine's name may be given once."""
    first: dict[str, Place] = {}
    for provider in root.items("providers"):
        for machine in declared(provider):
            if machine.name in first:
                _again(doc, machine.place, first[machine.name], machine.name)
            first.setdefault(machine.name, machine.place)


def _credentials(doc: Document, provider: Item, secrets: Document | None) -> None:
    if secrets is not None and not isinstance(secrets.data, dict):
        return  # could not be read, which was said
    known = {} if secrets is None else {item.text("name"): item for item in top(secrets).items("credentials")}
    for machine in provider.items("machines"):
        name = machine.text("credentials")
        if secrets is None and name:
            doc.problem(machine.at("credentials"), f"found {doc.found(name)}", "a name in a secrets file, given by -s")
        else:
            _known(doc, machine.at("credentials"), name, known, "a name in the secrets file's credentials")


def _failures(doc: Document, provider: Item) -> None:
    failures = provider.data.get("failures")
    machines = {machine.name for machine in declared(provider)}
    for name in failures if isinstance(failures, dict) else ():
        _known(doc, provider.at("failures", name), name, machines, "one of the provider's machines")


def _pools(doc: Document, provider: Item, labels: dict[str, Item], images: dict[str, Item]) -> None:
    machines = list(declared(provider))
    names = {machine.name: machine for machine in machines}
    taken: dict[str, str] = {}
    by_name(doc, provider.items("pools"))
    for pool in provider.items("pools"):
        by_name(doc, pool.items("labels"))
        for label in pool.items("labels"):
            _known(doc, label.at("name"), label.text("name"), labels, "one of the labels")
            _known(doc, label.at("diskimage"), label.text("diskimage"), images, "one of the diskimages")
        if "machines" in pool.data and "where" in pool.data:
            doc.problem(pool.at("where"), "found both machines and where", "one of them, or none for all machines")
        seen: set[str] = set()
        for place, name in pool.texts("machines"):
            _known(doc, place, name, names, f"a machine of provider {provider.text('name')}")
            if name in seen:
                doc.problem(place, f"found {doc.found(name)} again", "each machine once")
            seen.add(name)
        mine = _chosen(pool, machines)
        _shared(doc, pool, mine, taken)
        _sizes(doc, pool, machines, mine)


def _chosen(pool: Item, machines: list[Declared]) -> tuple[str, ...]:
    return chosen(pool.data, ((machine.name, machine.facts) for machine in machines))


def _shared(doc: Document, pool: Item, mine: tuple[str, ...], taken: dict[str, str]) -> None:
    """A machine of two pools would be counted by both."""
    twice = [name for name in dict.fromkeys(mine) if name in taken]
    for name in mine:
        taken.setdefault(name, pool.text("name"))
    if twice:
        key = "machines" if "machines" in pool.data else "where" if "where" in pool.data else "name"
        listed = ", ".join(twice[:_SOME]) + (f" and {len(twice) - _SOME} more" if len(twice) > _SOME else "")
        other = taken[twice[0]]
        allowed = "each machine in one pool of its provider, chosen by machines or where"
        doc.problem(pool.at(key), f"found {listed}, of pool {doc.found(other)} too", allowed)


def _sizes(doc: Document, pool: Item, machines: list[Declared], mine: tuple[str, ...]) -> None:
    limit = _COUNT.quietly(pool.data.get("max-servers"))
    if limit is not None and limit > len(mine):
        doc.warn(pool.at("max-servers"), f"found {limit}, and the pool has {len(mine)} machines")
    try:
        names = parse(pool.text("where")).names if pool.text("where") else ()
    except WhereError:
        return
    known = {*RESERVED, *(key for machine in machines for key in machine.facts)}
    unknown = [name for name in names if name not in known]
    for name in unknown:
        doc.warn(pool.at("where"), f"no machine of the provider has a property {name!r}{nearest(name, known)}")
    if not mine and not unknown:
        doc.warn(pool.at("where" if names else "name"), "the pool has no machines")


def _capacity(doc: Document, root: Item, labels: dict[str, Item]) -> None:
    """`min-ready` above what the label's pools can ever hold would be waited for until the end of days."""
    room: dict[str, float] = {}
    for provider in root.items("providers"):
        machines = list(declared(provider))
        for pool in provider.items("pools"):
            size = _room(provider, pool, machines)
            for name in {label.text("name") for label in pool.items("labels")}:
                room[name] = room.get(name, 0) + size
    for name, label in labels.items():
        wanted = _COUNT.quietly(label.data.get("min-ready")) or 0
        if name not in room:
            if wanted > 0:
                doc.problem(label.at("min-ready"), f"found {wanted}", "0, because no pool offers this label")
            else:
                doc.warn(label.at("name"), "no pool offers this label")
        elif wanted > room[name]:
            allowed = f"at most {room[name]}, which is what its pools can hold (machines, max-servers)"
            doc.problem(label.at("min-ready"), f"found {wanted}", allowed)


def _room(provider: Item, pool: Item, machines: list[Declared]) -> float:
    """How many nodes the pool can hold; without end where the file does not let us tell."""
    mine = set(_chosen(pool, machines))
    given = pool.data.get("machines", pool.data.get("where"))
    is_known = (
        len(mine) == len(given) if isinstance(given, list) else rules.where.quietly(given or "x == x") is not None
    )
    listed = provider.data.get("machines", [])
    named = sum(1 for item in provider.items("machines") if item.text("name"))
    is_counted = provider.data.get("count") is None or fake.COUNT.quietly(provider.data["count"]) is not None
    if not (is_known and is_counted and isinstance(listed, list) and len(listed) == named):
        return math.inf
    if provider.text("driver") not in DRIVERS:
        return math.inf
    limit = _COUNT.quietly(pool.data.get("max-servers"))
    return len(mine) if limit is None else min(limit, len(mine))
