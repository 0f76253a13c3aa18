"""The words of the schemas: what a value may be, said once for the check and for the people who got it wrong.

Every scalar arrives as text (see `source`); a rule turns it into what the records hold, or raises voluptuous' Invalid,
whose message is what is *allowed*; `schema` puts what was *found* in front of it.  Durations are seconds, sizes bytes.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import voluptuous as vol

from nodepool.config.where import WhereError
from nodepool.config.where import parse as parse_where


class NotAllowed(Exception):
    """Raised inside a rule: the value is not what the rule's words allow."""


class Unknown(vol.Invalid):
    """A key that is not in the schema; the message is the remedy, `known` what there is."""


class Missing(vol.Invalid):
    """A key that has to be there; the message is what it may be."""


class Said(vol.Invalid):
    """The message already says both what was found and what is allowed."""


class Rule:
    """A check with the words for what it allows; `parse` raises NotAllowed, ValueError or Invalid in own words."""

    def __init__(self, allowed: str, parse: Callable[[Any], Any], keys: tuple[str, ...] = ()) -> None:
        self.allowed = allowed
        self.parse = parse
        self.keys = keys  # of a table

    def __call__(self, value: Any) -> Any:
        """The value as the records hold it; raises Invalid."""
        try:
            return self.parse(value)
        except (NotAllowed, ValueError):
            raise vol.Invalid(self.allowed) from None

    def quietly(self, value: Any) -> Any:
        """The value as the records hold it, None when it is not allowed (whoever checks says so)."""
        try:
            return self(value)
        except vol.Invalid:
            return None


def table(required: Mapping[str, Any], optional: Mapping[str, Any], *, what: str = "a mapping") -> Rule:
    """A mapping with these keys and no others; each with the rule for its value.  All that is wrong is said."""
    known = sorted([*required, *optional])
    keys: dict[Any, Any] = {vol.Optional(key): rule for key, rule in (*required.items(), *optional.items())}

    def unknown(_value: Any) -> Any:
        raise Unknown(", ".join(known))

    schema = vol.Schema({**keys, vol.Extra: unknown})

    def parse(value: Any) -> Any:
        if not isinstance(value, dict):
            raise NotAllowed
        absent: list[vol.Invalid] = [Missing(rule.allowed, [key]) for key, rule in required.items() if key not in value]
        try:
            result = schema(value)
        except vol.MultipleInvalid as error:
            raise vol.MultipleInvalid([*absent, *error.errors]) from None
        if absent:
            raise vol.MultipleInvalid(absent)
        return result

    return Rule(f"{what} of {', '.join(known)}", parse, tuple(known))


def each(rule: Rule, *, least: int = 0) -> Rule:
    """A list; what is wrong with any of its entries is said, not just with the first."""
    allowed = f"a list, each entry {rule.allowed}" if least == 0 else f"a list of at least {least}: {rule.allowed}"

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) < least:
            raise NotAllowed
        result = []
        errors: list[vol.Invalid] = []
        for index, entry in enumerate(value):
            try:
                result.append(rule(entry))
            except vol.Invalid as error:
                error.prepend([index])
                errors.extend(getattr(error, "errors", [error]))
        if errors:
            raise vol.MultipleInvalid(errors)
        return tuple(result)

    return Rule(allowed, parse)


def entries(keys: Rule, values: Rule) -> Rule:
    """A mapping with keys of the user's own."""

    def parse(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise NotAllowed
        result = {}
        errors: list[vol.Invalid] = []
        for key, entry in value.items():
            for rule, given in ((keys, key), (values, entry)):
                try:
                    result[key] = rule(given)
                except vol.Invalid as error:
                    error.prepend([key])
                    errors.extend(getattr(error, "errors", [error]))
                    break
        if errors:
            raise vol.MultipleInvalid(errors)
        return result

    return Rule(f"a mapping of {keys.allowed} to {values.allowed}", parse)


def record(kind: Callable[..., Any], values: Mapping[str, Any], **more: Any) -> Any:
    """A record from a table's values; keys are the fields' names with dashes, what is absent has the default."""
    return kind(**{key.replace("-", "_"): value for key, value in values.items()}, **more)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'min-ready'?` when a known word is near, otherwise empty."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise NotAllowed
    return value


def matching(pattern: str, allowed: str) -> Rule:
    """Text that fits a pattern as a whole."""
    compiled = re.compile(pattern, re.ASCII)

    def parse(value: Any) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise NotAllowed
        return value

    return Rule(allowed, parse)


def one_of(*words: str) -> Rule:
    """One of these words."""

    def parse(value: Any) -> str:
        if value not in words:
            hint = nearest(value, words) if isinstance(value, str) else ""
            raise vol.Invalid(", ".join(words) + hint)
        return cast(str, value)

    return Rule(", ".join(words), parse)


def whole(least: int, most: int, words: str = "") -> Rule:
    """A whole number within bounds, both included."""

    def parse(value: Any) -> int:
        if not isinstance(value, str) or not re.fullmatch(r"-?(0|[1-9]\d{0,17})", value, re.ASCII):
            raise NotAllowed
        number = int(value)
        if not least <= number <= most:
            raise NotAllowed
        return number

    return Rule(words or f"a whole number from {least} to {most}", parse)


def _boolean(value: Any) -> bool:
    lower = value.lower() if isinstance(value, str) else ""
    if lower in ("true", "yes", "on"):
        return True
    if lower in ("false", "no", "off"):
        return False
    raise NotAllowed


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_DURATION = 10 * 365 * 86400.0


def _duration(value: Any) -> float:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([smhd]?)", value, re.ASCII) if isinstance(value, str) else None
    if match is None:
        raise NotAllowed
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > LONGEST_DURATION:
        raise vol.Invalid("at most ten years, 3650d")
    return seconds


def _some_duration(value: Any) -> float:
    seconds = _duration(value)
    if seconds <= 0:
        raise NotAllowed
    return seconds


_BYTES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def _size(value: Any) -> int:
    """Bytes; K, M, G, T are powers of 1024 with or without iB, as diskimage-builder and qemu-img take them."""
    pattern = r"(\d{1,15})(?:([KMGT])(?:iB)?)?"
    match = re.fullmatch(pattern, value, re.ASCII) if isinstance(value, str) else None
    if match is None:
        raise NotAllowed
    return int(match[1]) * int(1024 ** _BYTES[match[2] or ""])


def _mac(value: Any) -> str:
    text = value.lower().replace("-", ":") if isinstance(value, str) else ""
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", text):
        raise NotAllowed
    if int(text[:2], 16) & 1:
        raise vol.Invalid("the address of one card; this one is a multicast address")
    if text == "00:00:00:00:00:00":
        raise NotAllowed
    return text


def _ip(value: Any) -> str:
    if not isinstance(value, str):
        raise NotAllowed
    return str(ipaddress.IPv4Address(value))


def _cidr(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\d.]+/\d{1,2}", value, re.ASCII):
        raise NotAllowed
    network = ipaddress.IPv4Interface(value).network
    if str(network) != value:
        raise vol.Invalid(f"the network's own address, which is {network}")
    if not 8 <= network.prefixlen <= 30:
        raise vol.Invalid("a prefix from /8 to /30")
    return value


def _database(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"sqlite:///[^?#]+|(mysql|mariadb)\+pymysql://[^/]*/[^/?]+(\?.*)?", text):
        raise NotAllowed
    return text


def _bmc(value: Any) -> str:
    """The address in one spelling, so that two spellings of one BMC are seen to be the same."""
    match = (
        re.fullmatch(r"ipmi://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*)(?::(\d{1,5}))?/?", value, re.ASCII)
        if isinstance(value, str)
        else None
    )
    if match is None or not 1 <= int(match[2] or 623) <= 65535:
        raise NotAllowed
    host = match[1].lower()
    if host.startswith("["):
        host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
    elif re.fullmatch(r"[\d.]+", host):
        host = str(ipaddress.IPv4Address(host))
    return f"ipmi://{host}:{int(match[2] or 623)}"


def _where(value: Any) -> str:
    text = _text(value)
    try:
        parse_where(text)
    except WhereError as error:
        raise Said(str(error)) from None
    return text


def name(what: str) -> Rule:
    """A name as users type it on a command line."""
    allowed = f"a name for the {what}: letters, digits and ._+-, at most 63, the first a letter or digit"
    return matching(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}", allowed)


def _property(value: Any) -> str:
    if value in RESERVED:
        raise vol.Invalid(f"a name other than {', '.join(RESERVED)}, which the machine's own entries are")
    return str(_PROPERTY(value))


RESERVED = ("name", "rack", "firmware")
_PROPERTY = matching(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}", "a word of letters, digits, _ . and -, at most 63")
text = Rule("text", _text)
path = Rule("the path of a file or folder", lambda value: Path(_text(value)))
boolean = Rule("true or false", _boolean)
duration = Rule("seconds, or a number with s, m, h or d, such as 90s, 15m, 2h, 7d", _duration)
some_duration = Rule("more than 0 seconds, such as 30, 90s, 15m, 2h, 7d", _some_duration)
size = Rule("bytes, or a number with K, M, G or T, such as 512M, 4G, 4GiB", _size)
mac = Rule("a MAC address such as 52:54:00:12:34:56", _mac)
ip = Rule("an IPv4 address such as 198.51.100.11", _ip)
cidr = Rule("an IPv4 network such as 198.51.100.0/24", _cidr)
port = whole(1, 65535, "a port from 1 to 65535")
database = Rule("sqlite:///PATH or mysql+pymysql://USER:PASSWORD@HOST/DATABASE", _database)
bmc = Rule("ipmi://HOST or ipmi://HOST:PORT", _bmc)
where = Rule("an expression such as class == small and rack != r2", _where)
property_name = Rule(_PROPERTY.allowed, _property)
property_value = Rule("text", lambda value: _text(value) if value != "" else "")
environment_name = matching(r"[A-Za-z_][A-Za-z0-9_]*", "a name of letters, digits and _")
environment_value = Rule("text", lambda value: value if isinstance(value, str) and "\0" not in value else _text(None))
interface = matching(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}", "the name of a network interface, at most 15 characters")
