"""The configuration, indexed for the planner."""

from dataclasses import replace

from nodepool.config.records import Config, Credential, MachineSpec, Pool, PoolLabel, Provider
from nodepool.plan import catalog

SPEC = MachineSpec("r1n1", "rack1", bmc="ipmi://192.0.2.1", credentials="bmc")


def digest(spec=SPEC, password="one"):
    provider = Provider("rack1", "metal", machines=(spec,))
    config = Config("g", providers={"rack1": provider}, credentials={"bmc": Credential("admin", password)})
    return catalog(config).digests["r1n1"]


def test_a_machines_digest_changes_with_its_yaml_and_its_password_alone():
    assert digest() == digest()
    assert len({digest(), digest(replace(SPEC, bmc="ipmi://192.0.2.2")), digest(password="two")}) == 3


def pool(name, size, *labels):
    return Pool(name, "p", size, tuple(f"{name}{n}" for n in range(size)), tuple(PoolLabel(x, "image") for x in labels))


def fits(pools, labels):
    return catalog(Config("g", providers={"p": Provider("p", "fake", pools=pools)})).fits(labels.split())


def test_nodes_of_several_labels_fit_when_each_finds_a_pool_of_its_own():
    pools = (pool("x", 1, "a", "b"), pool("y", 1, "a"))
    assert fits(pools, "a b")
    assert fits(pools, "a a")
    assert not fits(pools, "a a b")
    assert not fits(pools, "b b")


def test_who_sits_in_the_only_place_of_another_moves_on_through_several_pools():
    pools = (pool("x", 1, "a", "b"), pool("y", 1, "b", "c"), pool("z", 1, "c", "d"))
    assert fits(pools, "b c a")
    assert fits(pools, "a b c")
    assert not fits(pools, "a b c d")
