"""A changed YAML while the daemon runs."""

from nodepool.clock import VirtualClock
from nodepool.cmd.running import ConfigLoop
from nodepool.config import ConfigFile
from nodepool.errors import ConfigError

YAML = """\
version: 1
diskimages: [{name: image, elements: [none]}]
labels: [{name: label}]
providers:
  - {name: lab, driver: fake, count: %d, pools: [{name: main, labels: [{name: label, diskimage: image}]}]}
"""


def test_a_generation_that_could_not_be_brought_into_force_is_tried_again(tmp_path):
    path, key, put = tmp_path / "nodepool.yaml", tmp_path / "key", []

    def bring_into_force(config):
        if not key.exists():
            raise ConfigError((f"the SSH key {key} cannot be used",))
        put.append(config.generation)

    path.write_text(YAML % 1)
    loop = ConfigLoop(file := ConfigFile(path), VirtualClock(), bring_into_force)
    before = file.current.generation
    path.write_text(YAML % 22)
    loop.pass_once()
    assert (
        loop.sentence
        == f"generation {before} in force; the edit since then is broken: the SSH key {key} cannot be used"
    )
    key.touch()
    loop.pass_once()
    loop.pass_once()
    assert put == [file.current.generation]
    assert loop.sentence == f"generation {file.current.generation} in force"
