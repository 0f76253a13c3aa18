"""The configuration, indexed for the planner: made once per generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nodepool.config.records import Config, MachineSpec, Pool, PoolLabel, Provider


@dataclass(frozen=True)
class Catalog:
    """Who offers what."""

    config: Config
    machines: Mapping[str, MachineSpec]
    pool_of: Mapping[str, Pool]  # by machine name
    offers: Mapping[str, tuple[tuple[Pool, PoolLabel], ...]]  # by label, in the order of the YAML
    images: Mapping[str, tuple[str, ...]]  # image -> providers that use it
    machine_at: Mapping[str, MachineSpec]  # by MAC

    def provider(self, name: str) -> Provider | None:
        """The provider of this name, if the YAML still has it."""
        return self.config.providers.get(name)

    def capacity(self, label: str) -> int:
        """How many nodes of `label` there can ever be at once."""
        return sum(pool_limit(pool) for pool, _ in self.offers.get(label, ()))


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
    )
