"""From files to one frozen Config, or to all the problems at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodepool.config import rules, source
from nodepool.config.checks import check
from nodepool.config.problems import Document, found
from nodepool.config.records import Config, Credential, DiskImage, Label, Network, Statsd
from nodepool.config.rules import record
from nodepool.config.schema import CONFIG, DRIVERS, SECRETS, VERSION, validate
from nodepool.errors import ConfigError

_STATSD = ("STATSD_HOST", "STATSD_PORT")  # of the environment, as Zuul's Nodepool takes them
_PLAIN = (
    "database",
    "socket",
    "images-dir",
    "elements-dir",
    "build-log-dir",
    "build-log-retention",
    "agent-dir",
    "event-retention",
    "launch-workers",
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and what should be looked at in it, a line each."""

    config: Config
    warnings: tuple[str, ...] = ()


def load(path: Path, secure: Path | None = None, env: Mapping[str, str] = os.environ) -> Config:
    """The configuration of `path` and the secrets of `secure`; ConfigError lists all the problems of both."""
    return load_checked(path, secure, env).config


def load_checked(path: Path, secure: Path | None = None, env: Mapping[str, str] = os.environ) -> Loaded:
    """Like `load`, with the warnings."""
    doc = source.read(path, env)
    secrets = None if secure is None else _secrets(secure, env)
    kept = validate(secrets, SECRETS) if secrets is not None and secrets.data is not None else {}
    values = statsd = None
    if _is_readable(doc):
        values = validate(doc, CONFIG)
        check(doc, secrets)
        statsd = _statsd(doc, env)
    problems = (*doc.problems, *(secrets.problems if secrets else ()))
    if problems or values is None or kept is None:
        raise ConfigError(problems)
    config = _assemble(values, kept, statsd, _generation(doc, secrets, env))
    return Loaded(config, doc.warnings)


def _secrets(path: Path, env: Mapping[str, str]) -> Document:
    doc = source.read(path, env, secret=True)
    if doc.data is None and not doc.problems:
        doc.data = {}  # a file without secrets is not wrong
    return doc


def _is_readable(doc: Document) -> bool:
    """Whether the rest can be judged at all; says why not."""
    if doc.data is None and doc.problems:
        return False
    if not isinstance(doc.data, dict):
        doc.problem((), f"found {found(doc.data)}", f"a mapping, which begins with version: {VERSION}")
        return False
    version = rules.whole(1, 10**9).quietly(doc.data.get("version"))
    if version is not None and version > VERSION:
        doc.problem(("version",), f"found {version}", f"{VERSION} (this daemon reads version {VERSION})")
        return False
    return True


def _statsd(doc: Document, env: Mapping[str, str]) -> Statsd | None:
    """The environment's, for when the file has none."""
    host, port = (env.get(name, "") for name in _STATSD)
    if "statsd" in doc.data or not host:
        return None
    if port and rules.port.quietly(port) is None:
        doc.problem_at(0, (), f"found STATSD_PORT={port!r} in the environment; allowed: {rules.port.allowed}")
        return None
    return Statsd(host, int(port)) if port else Statsd(host)


def _generation(doc: Document, secrets: Document | None, env: Mapping[str, str]) -> str:
    """What the configuration depends on, in 12 hex digits: both files and the variables that were put in."""
    digest = hashlib.sha256()
    variables: dict[str, str | None] = {name: env.get(name) for name in _STATSD}
    for part in (doc, secrets):
        content = (part.content or b"") if part else b""
        digest.update(len(content).to_bytes(8, "big") + content)
        variables.update(part.variables if part else {})
    digest.update(repr(sorted(variables.items())).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:12]


def _assemble(values: Mapping[str, Any], kept: Mapping[str, Any], statsd: Statsd | None, generation: str) -> Config:
    """The record from what schemas and checks have passed; the secrets go before what the YAML says."""
    secret_env = {entry["name"]: entry["env-vars"] for entry in kept.get("diskimages", ())}
    images = {}
    for entry in values.get("diskimages", ()):
        env_vars = {**entry.get("env-vars", {}), **secret_env.get(entry["name"], {})}
        images[entry["name"]] = record(DiskImage, {**entry, "env-vars": env_vars})
    plain = {key: values[key] for key in _PLAIN if key in values}
    if "database" in kept:
        plain["database"] = kept["database"]
    config: Config = record(
        Config,
        plain,
        generation=generation,
        statsd=record(Statsd, values["statsd"]) if "statsd" in values else statsd,
        networks={entry["name"]: record(Network, entry) for entry in values.get("networks", ())},
        diskimages=images,
        labels={entry["name"]: record(Label, entry) for entry in values.get("labels", ())},
        providers={entry["name"]: DRIVERS[entry["driver"]].build(entry) for entry in values.get("providers", ())},
        credentials={
            entry["name"]: Credential(entry["username"], entry["password"]) for entry in kept.get("credentials", ())
        },
    )
    return config
