"""The configuration, indexed for the planner: made once per generation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nodepool.config.records import Config, Credential, MachineSpec, Pool, PoolLabel, Provider

Key = tuple[str, str]  # provider and name of a pool


@dataclass(frozen=True)
class Catalog:
    """Who offers what."""

    config: Config
    machines: Mapping[str, MachineSpec]
    pool_of: Mapping[str, Pool]  # by machine name
    offers: Mapping[str, tuple[tuple[Pool, PoolLabel], ...]]  # by label, in the order of the YAML
    images: Mapping[str, tuple[str, ...]]  # image -> providers that use it
    machine_at: Mapping[str, MachineSpec]  # by MAC
    digests: Mapping[str, str]  # of what the YAML and the secrets say about each machine, by name

    def provider(self, name: str) -> Provider | None:
        """The provider of this name, if the YAML still has it."""
        return self.config.providers.get(name)

    def capacity(self, label: str) -> int:
        """How many nodes of `label` there can ever be at once."""
        return sum(pool_limit(pool) for pool, _ in self.offers.get(label, ()))

    def fits(self, labels: Iterable[str]) -> bool:
        """Whether nodes of these labels, one for each, could ever live at the same time (a maximum flow)."""
        wanted = tuple(labels)
        offers = {label: [_key(pool) for pool, _ in self.offers.get(label, ())] for label in wanted}
        room = {_key(pool): pool_limit(pool) for label in offers for pool, _ in self.offers.get(label, ())}
        seated: Counter[tuple[str, Key]] = Counter()  # label, pool -> nodes

        def seat(label: str, tried: set[Key]) -> bool:
            for key in offers[label]:
                if key in tried:
                    continue
                tried.add(key)
                if room[key]:
                    room[key] -= 1
                elif not make_place(key, tried):
                    continue
                seated[label, key] += 1
                return True
            return False

        def make_place(key: Key, tried: set[Key]) -> bool:
            sitting = [label for label in offers if seated[label, key]]
            for label in sitting:
                if seat(label, tried):
                    seated[label, key] -= 1
                    return True
            return False

        return all(seat(label, set()) for label in wanted)


def _key(pool: Pool) -> Key:
    return pool.provider, pool.name


def pool_limit(pool: Pool) -> int:
    """How many nodes a pool may have at once."""
    machines = len(pool.machines)
    return machines if pool.max_servers is None else min(pool.max_servers, machines)


def catalog(config: Config) -> Catalog:
    """Index `config`."""
    offers: dict[str, list[tuple[Pool, PoolLabel]]] = {}
    images: dict[str, list[str]] = {}
    pool_of: dict[str, Pool] = {}
    for provider in config.providers.values():
        for pool in provider.pools:
            for machine in pool.machines:
                pool_of[machine] = pool
            for offer in pool.labels:
                offers.setdefault(offer.name, []).append((pool, offer))
                users = images.setdefault(offer.diskimage, [])
                if provider.name not in users:
                    users.append(provider.name)
    return Catalog(
        config=config,
        machines={spec.name: spec for provider in config.providers.values() for spec in provider.machines},
        pool_of=pool_of,
        offers={label: tuple(found) for label, found in offers.items()},
        images={image: tuple(found) for image, found in images.items()},
        machine_at={
            interface.mac: spec
            for provider in config.providers.values()
            for spec in provider.machines
            for interface in spec.interfaces
        },
        digests={
            spec.name: _digest(spec, config.credentials.get(spec.credentials))
            for provider in config.providers.values()
            for spec in provider.machines
        },
    )


def _digest(spec: MachineSpec, credential: Credential | None) -> str:
    """16 hex digits; the last four are of the credential: enough to see a change, too few to find a password by."""
    secret = f"{spec.name}\n{credential.username}\n{credential.password}" if credential else ""
    return _hex(repr(spec))[:12] + _hex(secret)[:4]


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
