"""The whole YAML's schema, and how voluptuous' findings become problems with a place."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import voluptuous as vol

from nodepool.config import fake, metal, rules
from nodepool.config.common import Declared
from nodepool.config.problems import Document, Item, Place
from nodepool.config.rules import Missing, NotAllowed, Rule, Said, Unknown, each, entries, nearest, one_of, table, whole

VERSION = 1
DRIVERS: dict[str, ModuleType] = {"metal": metal, "fake": fake}
DRIVER = one_of(*DRIVERS)

NETWORK = table(
    {"name": rules.name("network"), "interface": rules.interface, "cidr": rules.cidr, "gateway": rules.ip},
    {"dhcp": one_of("managed", "external"), "address": rules.ip, "port": rules.port, "dns": each(rules.ip)},
)
ENVIRONMENT = entries(rules.environment_name, rules.environment_value)
DISKIMAGE = table(
    {"name": rules.name("diskimage")},
    {
        "release": rules.text,
        "elements": each(rules.text),
        "formats": each(one_of("raw", "raw.zst"), least=1),
        "rebuild-age": rules.some_duration,
        "build-timeout": rules.some_duration,
        "env-vars": ENVIRONMENT,
        "dib-cmd": rules.text,
        "assembly": one_of("nodepool", "dib"),
        "pause": rules.boolean,
        "username": rules.text,
    },
)
LABEL = table(
    {"name": rules.name("label")},
    {
        "min-ready": whole(-1, 1_000_000, "a whole number, -1 to switch the label off"),
        "max-ready-age": rules.duration,
    },
)
STATSD = table({"host": rules.text}, {"port": rules.port, "prefix": rules.text})


def _provider(value: Any) -> Any:
    """By the schema of its driver; without a driver that we know only that is said."""
    if not isinstance(value, dict):
        raise NotAllowed
    driver = value.get("driver")
    if driver is None:
        raise Missing(DRIVER.allowed, ["driver"])
    try:
        return DRIVERS[DRIVER(driver)].SCHEMA(value)
    except vol.MultipleInvalid:
        raise
    except vol.Invalid as error:
        error.prepend(["driver"])
        raise


CONFIG = table(
    {"version": whole(VERSION, VERSION, f"{VERSION} (this daemon reads version {VERSION})")},
    {
        "database": rules.database,
        "socket": rules.path,
        "images-dir": rules.path,
        "elements-dir": rules.path,
        "build-log-dir": rules.path,
        "build-log-retention": whole(-1, 100_000, "a whole number of logs, -1 for all"),
        "agent-dir": rules.path,
        "event-retention": rules.some_duration,
        "launch-workers": whole(1, 1000),
        "statsd": STATSD,
        "networks": each(NETWORK),
        "diskimages": each(DISKIMAGE),
        "labels": each(LABEL),
        "providers": each(Rule("a provider: a mapping with name, driver, pools", _provider)),
    },
)


def _bytes(least: int, most: int, what: str) -> Rule:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value.encode()) <= most or "\0" in value:
            raise NotAllowed
        return value

    return Rule(f"a {what} of at most {most} bytes, which is what IPMI 2.0 carries", parse)


CREDENTIAL = table(
    {"name": rules.name("credentials"), "username": _bytes(0, 16, "user name"), "password": _bytes(0, 20, "password")},
    {},
)
SECRETS = table(
    {},
    {
        "credentials": each(CREDENTIAL),
        "database": rules.database,
        "diskimages": each(table({"name": rules.name("diskimage"), "env-vars": ENVIRONMENT}, {})),
    },
)


def declared(provider: Item) -> Iterator[Declared]:
    """The machines of a provider, by its driver; none when the driver is not known."""
    driver = DRIVERS.get(provider.text("driver"))
    return driver.declared(provider) if driver else iter(())


def validate(doc: Document, rule: Rule) -> Any:
    """The checked values, or None after telling the document all that is wrong."""
    try:
        return rule(doc.data)
    except vol.Invalid as error:
        for each_error in getattr(error, "errors", [error]):
            _tell(doc, each_error)
        return None


def _tell(doc: Document, error: vol.Invalid) -> None:
    place: Place = tuple(step if isinstance(step, int) else str(step) for step in error.path)
    if isinstance(error, Unknown):
        _tell_unknown(doc, place, error.msg)
    elif isinstance(error, Missing):
        doc.problem(place, "found nothing", error.msg)
    elif isinstance(error, Said):
        doc.problem_at(doc.line(place), place, error.msg)
    elif place[-1:] == ("database",):
        doc.problem(place, "found another kind of address", error.msg)
    else:
        doc.problem(place, f"found {doc.found(doc.value(place))}", error.msg)


def _tell_unknown(doc: Document, place: Place, known: str) -> None:
    key = str(place[-1])
    hint = nearest(key, known.split(", "))
    if place == ("credentials",):
        hint = "; credentials belong in the secrets file (-s)"
    doc.problem(place, "found an unknown key", known + hint)
