"""What a good configuration means."""

import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nodepool.config import common, fake, load, load_checked, metal, schema
from nodepool.config.records import Config, Credential, Interface, RootDevice, Statsd
from nodepool.errors import ConfigError

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "nodepool.yaml.sample"

HEAD = "version: 1\ndiskimages: [{name: debian, elements: [debian-minimal]}]\nlabels: [{name: small}]\n"


@pytest.fixture
def secure(tmp_path):
    path = tmp_path / "secure.yaml"
    path.write_text(
        "credentials:\n"
        "  - {name: rack1, username: admin, password: hunter2}\n"
        "database: mysql+pymysql://nodepool:hunter2@db.example.org/nodepool\n"
        "diskimages:\n"
        "  - {name: debian-12, env-vars: {DIB_TOKEN: sesame, DIB_DEBIAN_COMPONENTS: main}}\n"
    )
    path.chmod(0o600)
    return path


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "nodepool.yaml"
        path.write_text(text)
        return path

    return write


def provider(more="count: 2", pools="[{name: main, labels: [{name: small, diskimage: debian}]}]"):
    indented = "".join(f"    {line}\n" for line in more.splitlines())
    return f"providers:\n  - name: p\n    driver: fake\n{indented}    pools: {pools}\n"


def pools_of(config):
    return {pool.name: pool for pool in config.providers["p"].pools}


def test_the_sample_loads_without_a_warning_but_for_what_it_shows(secure):
    assert load_checked(SAMPLE, secure, {}).warnings == ()


def test_the_sample_has_every_key_that_there_is():
    text = SAMPLE.read_text()
    tables = [schema.CONFIG, schema.NETWORK, schema.DISKIMAGE, schema.LABEL, schema.STATSD, schema.CREDENTIAL]
    tables += [metal.SCHEMA, metal.MACHINE, metal.INTERFACE, metal.ROOT_DEVICE, fake.SCHEMA, fake.MACHINE]
    tables += [common.SSH, common.POOL, common.POOL_LABEL, schema.SECRETS]
    missing = {key for table in tables for key in table.keys if f"{key}:" not in text}
    assert missing == set()


def test_what_the_sample_calls_a_default_is_the_default(secure, yaml):
    whole = load(SAMPLE, secure, {})
    lines = [line for line in SAMPLE.read_text().splitlines() if "# (default)" not in line]
    # Nothing is left of this one but its heading.
    text = "\n".join(lines).replace("    ssh:                                       # how", "    # how")
    assert replace(load(yaml(text), secure, {}), generation="") == replace(whole, generation="")


def test_the_quick_start_needs_no_environment_and_no_secrets():
    config = load(ROOT / "tools/fake.yaml", env={})
    machines = config.providers["provider"].machines
    assert [machine.name for machine in machines][::9] == ["provider-01", "provider-10"]
    assert all(machine.accept for machine in machines)


def test_the_quick_start_honours_the_ssh_key_of_the_environment():
    config = load(ROOT / "tools/fake.yaml", env={"NODEPOOL_SSH_KEY": "/home/me/.ssh/id"})
    assert config.providers["provider"].ssh.key == Path("/home/me/.ssh/id")


def test_a_metal_machine_arrives_whole(secure):
    config = load(SAMPLE, secure, {})
    machine = config.providers["rack1"].machines[0]
    assert machine.bmc == "ipmi://192.0.2.11:623"
    assert machine.interfaces == (Interface("52:54:00:00:00:01", "198.51.100.11"),)
    assert machine.root_device == RootDevice(4 << 30, "S3Z1NB0K", "0x5002538e40a1b2c3", "sda")
    assert machine.properties == {"class": "small", "gpus": "0"}
    assert config.credentials[machine.credentials] == Credential("admin", "hunter2")


def test_secrets_go_before_the_yaml(secure):
    config = load(SAMPLE, secure, {})
    assert config.database == "mysql+pymysql://nodepool:hunter2@db.example.org/nodepool"
    assert config.diskimages["debian-12"].env_vars == {"DIB_TOKEN": "sesame", "DIB_DEBIAN_COMPONENTS": "main"}


def test_no_secret_is_in_the_configuration_as_it_prints_itself(secure):
    shown = repr(load(SAMPLE, secure, {}))
    assert "hunter2" not in shown
    assert "sesame" not in shown


def test_a_file_with_a_version_alone_is_a_configuration_of_defaults(yaml):
    config = load(yaml("version: 1\n"), env={})
    assert config == Config(generation=config.generation)


def test_every_plain_setting_of_the_record_can_be_set(secure):
    config = load(SAMPLE, secure, {})
    assert {field.name for field in fields(Config)} >= {"socket", "agent_dir"}
    assert config.elements_dir == Path("elements")
    assert config.build_log_dir == Path("var/images/logs")


def test_scalars_keep_their_spelling(yaml):
    config = load(
        yaml(
            "version: 1\ndiskimages:\n"
            "  - {name: no, release: 22.10, elements: [x], env-vars: {DIB_A: 010, DIB_B: yes, DIB_C: 1e3, DIB_D: ''}}\n"
        ),
        env={},
    )
    image = config.diskimages["no"]
    assert image.release == "22.10"
    assert image.env_vars == {"DIB_A": "010", "DIB_B": "yes", "DIB_C": "1e3", "DIB_D": ""}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30", 30), ("90s", 90), ("15m", 900), ("2h", 7200), ("7d", 604800), ("0.5", 0.5), ("1.5h", 5400)],
)
def test_durations_are_seconds(yaml, written, seconds):
    config = load(yaml(HEAD + provider(f"count: 1\nboot-timeout: {written}")), env={})
    assert config.providers["p"].boot_timeout == seconds


@pytest.mark.parametrize(
    ("written", "size"),
    [("4G", 4 << 30), ("512M", 512 << 20), ("4GiB", 4 << 30), ("1000", 1000), ("1T", 1 << 40), ("8K", 8192)],
)
def test_sizes_are_bytes(written, size):
    assert metal.ROOT_DEVICE({"min-size": written})["min-size"] == size


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("ipmi://BMC1.example.org", "ipmi://bmc1.example.org:623"),
        ("ipmi://127.0.0.11:6230", "ipmi://127.0.0.11:6230"),
        ("ipmi://[2001:DB8:0:0::1]", "ipmi://[2001:db8::1]:623"),
        ("ipmi://[2001:db8::1]:7000/", "ipmi://[2001:db8::1]:7000"),
    ],
)
def test_a_bmc_has_one_spelling(written, address):
    assert metal.MACHINE.parse(machine_with(bmc=written))["bmc"] == address


@pytest.mark.parametrize("written", ["52-54-00-AB-CD-EF", "52:54:00:ab:cd:ef", "52:54:00:AB:CD:EF"])
def test_a_mac_has_one_spelling(written):
    assert metal.INTERFACE({"mac": written, "ip": "198.51.100.9"})["mac"] == "52:54:00:ab:cd:ef"


def machine_with(**values):
    card = {"mac": "52:54:00:00:00:01", "ip": "198.51.100.9"}
    return {"name": "m", "bmc": "ipmi://b", "credentials": "c", "interfaces": [card], **values}


def test_a_pool_without_a_choice_has_all_the_machines(yaml):
    config = load(yaml(HEAD + provider("count: 3")), env={})
    assert pools_of(config)["main"].machines == ("p-01", "p-02", "p-03")


def test_pools_choose_machines_by_name_and_by_where(yaml):
    config = load(
        yaml(
            HEAD
            + provider(
                "machines: [{name: a, rack: r1, properties: {class: big}}, {name: b, rack: r1}, {name: c, rack: r2}]",
                "[{name: some, machines: [c], labels: [{name: small, diskimage: debian}]},"
                " {name: rest, where: 'rack == r1 and class != big', labels: [{name: small, diskimage: debian}]}]",
            )
        ),
        env={},
    )
    assert {name: pool.machines for name, pool in pools_of(config).items()} == {"some": ("c",), "rest": ("b",)}


def test_anchors_and_merges_are_understood(yaml):
    config = load(
        yaml(
            "version: 1\nlabels:\n  - &a {name: one, max-ready-age: 1h}\n  - {<<: *a, name: two}\n"
            "  - {<<: [*a], name: three, max-ready-age: 2h}\n"
        ),
        env={},
    )
    assert [(label.name, label.max_ready_age) for label in config.labels.values()] == [
        ("one", 3600),
        ("two", 3600),
        ("three", 7200),
    ]


def test_variables_are_substituted_anywhere_in_a_value(yaml):
    path = yaml('version: 1\nimages-dir: "/%(NODEPOOL_A)/x/%(NODEPOOL_B:-b)%(OTHER)" # %(NODEPOOL_UNSET)\n')
    assert load(path, env={"NODEPOOL_A": "one", "NODEPOOL_B": "", "OTHER": "no"}).images_dir == Path("/one/x/b%(OTHER)")


def test_a_variable_cannot_add_keys(yaml):
    path = yaml('version: 1\nlabels: [{name: "%(NODEPOOL_L)"}]\n')
    with pytest.raises(ConfigError) as caught:
        load(path, env={"NODEPOOL_L": "x, min-ready: 3"})
    assert "labels[0].name: found 'x, min-ready: 3'" in caught.value.problems[0]


def test_statsd_comes_from_the_environment_when_the_file_has_none(yaml):
    assert load(yaml("version: 1\n"), env={"STATSD_HOST": "s", "STATSD_PORT": "99"}).statsd == Statsd("s", 99)
    assert load(yaml("version: 1\n"), env={"STATSD_HOST": "s"}).statsd == Statsd("s", 8125)


def test_statsd_of_the_file_goes_before_the_environment(yaml):
    assert load(yaml("version: 1\nstatsd: {host: here}\n"), env={"STATSD_HOST": "s"}).statsd == Statsd("here")


def test_a_wrong_port_in_the_environment_is_told(yaml):
    with pytest.raises(ConfigError, match="STATSD_PORT='x' in the environment; allowed: a port"):
        load(yaml("version: 1\n"), env={"STATSD_HOST": "s", "STATSD_PORT": "x"})


def test_the_generation_follows_content_secrets_and_variables(yaml, secure):
    one = load(yaml('version: 1\nimages-dir: "%(NODEPOOL_A:-x)"\n'), env={})
    path = yaml('version: 1\nimages-dir: "%(NODEPOOL_A:-x)"\n')
    assert load(path, env={}).generation == one.generation
    assert len(one.generation) == 12
    others = [load(path, env={"NODEPOOL_A": "y"}), load(yaml("version: 1\n# said\n"), env={})]
    assert len({one.generation, *(config.generation for config in others)}) == 3


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (HEAD, "labels[small].name: no pool offers this label"),
        (
            HEAD + provider("count: 2", "[{name: m, max-servers: 3, labels: [{name: small, diskimage: debian}]}]"),
            "found 3",
        ),
        (
            HEAD + provider("count: 2", "[{name: m, where: racks == r1, labels: [{name: small, diskimage: debian}]}]"),
            "no machine of the provider has a property 'racks'; did you mean 'rack'?",
        ),
        (HEAD + provider("count: 0"), "the pool has no machines"),
        ("version: 1\ndiskimages: [{name: empty}]\n", "found no elements"),
        ("version: 1\ndatabase: mysql+pymysql://u:pw@db/n\n", "belongs in the secrets file"),
    ],
)
def test_what_can_be_lived_with_is_a_warning(yaml, text, warning):
    warnings = load_checked(yaml(text), env={}).warnings
    assert len(warnings) == 1
    assert warning in warnings[0]


def test_a_thousand_machines_load_within_a_second(yaml, secure):
    machines = "".join(
        f"      - name: m{n}\n        rack: r{n % 40}\n        bmc: ipmi://10.1.{n // 250}.{n % 250 + 1}\n"
        f"        credentials: rack1\n        interfaces:\n"
        f"          - {{mac: '52:54:00:00:{n // 256:02x}:{n % 256:02x}', ip: 10.0.{n // 250 + 1}.{n % 250 + 1}}}\n"
        f"        root-device: {{min-size: 4G}}\n        properties: {{class: small}}\n"
        for n in range(1000)
    )
    path = yaml(
        "version: 1\nnetworks: [{name: lab, interface: br0, cidr: 10.0.0.0/16, gateway: 10.0.0.1}]\n"
        "diskimages: [{name: debian-12, elements: [x]}]\nlabels: [{name: small}]\n"
        f"providers:\n  - name: rack\n    driver: metal\n    network: lab\n    machines:\n{machines}"
        "    pools: [{name: main, where: class == small, labels: [{name: small, diskimage: debian-12}]}]\n"
    )
    start = time.process_time()
    config = load(path, secure, {})
    assert time.process_time() - start < 1.0
    assert len(config.providers["rack"].pools[0].machines) == 1000


def test_a_list_where_names_belong_is_a_problem_and_no_crash(yaml):
    with pytest.raises(ConfigError, match=r"machines\[p-01\]: found a mapping; allowed: a name"):
        load(yaml(HEAD + provider("count: 1", "[{name: m, machines: [{name: p-01}, [x]], labels: []}]")), env={})


def test_a_problem_stays_on_one_line_whatever_names_the_file_has(yaml):
    with pytest.raises(ConfigError) as caught:
        load(yaml('version: 1\nlabels: [{name: "a\\nb\\e[1m"}]\n' + provider()), env={})
    assert all(problem.isprintable() for problem in caught.value.problems)
