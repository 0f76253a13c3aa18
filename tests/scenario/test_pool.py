"""The life of a pool, as stories."""

from itertools import pairwise

from nodepool.model import Machine, NodeState, Operation
from nodepool.service import images


def test_an_empty_pool_fills_up_to_min_ready(tell):
    story = tell(machines=3, min_ready=2)
    assert story.run(story.ready(2))
    assert sorted(story.states().values()) == ["available", "occupied", "occupied"]
    assert len(story.builds("ready")) == 1


def test_a_ready_node_was_proven_by_a_login_to_a_new_boot(tell):
    story = tell()
    story.run(story.ready(1))
    [node] = story.nodes("ready")
    machine = story.world.machines[node.machine]
    assert node.host_key == machine.installed
    assert node.os_boot_id == machine.running != ""


def test_a_request_gets_all_of_its_nodes_or_none(tell):
    story = tell(machines=3, min_ready=1)
    story.run(story.ready(1))
    wants = story.request(3)
    held = []
    assert story.run(lambda: held.append(len(story.nodes("in-use"))) or story.state_of(wants) == "fulfilled")
    assert set(held) <= {0, 3}
    assert [node.state for node in story.nodes_of(wants)] == [NodeState.IN_USE] * 3


def test_the_requestors_keys_are_on_when_the_node_is_handed_over(tell):
    story = tell()
    wants = story.request(1, ssh_keys=("ssh-ed25519 AAAAuser me",))
    assert story.run(lambda: story.state_of(wants) == "fulfilled")
    [node] = story.nodes_of(wants)
    assert story.world.machines[node.machine].authorized == {
        "ssh-ed25519 AAAAuser me",
        "ssh-ed25519 AAAAnodepool nodepool",
    }


def test_what_is_given_back_is_wiped_and_ready_again(tell):
    story = tell(machines=1, min_ready=1, max_servers=1)
    wants = story.request()
    story.run(lambda: story.state_of(wants) == "fulfilled")
    [used] = story.nodes_of(wants)
    story.world.machines[used.machine].marker = "left by its user"
    story.release(wants)
    assert story.run(story.ready(1))
    [node] = story.nodes("ready")
    assert node.id != used.id
    assert story.world.machines[node.machine].marker == ""
    assert story.state_of(wants) == "released"


def test_a_large_request_is_not_starved_by_small_ones_behind_it(tell):
    story = tell(machines=2, min_ready=2, max_servers=2)
    story.run(story.ready(2))
    first = story.request(1)
    story.run(lambda: story.state_of(first) == "fulfilled")
    large, small = story.request(2), story.request(1)
    story.run(limit=60)
    assert (story.state_of(large), story.state_of(small)) == ("requested", "requested")
    story.release(first)
    assert story.run(lambda: story.state_of(large) == "fulfilled")
    assert story.state_of(small) == "requested"


def test_the_pool_never_has_more_nodes_than_max_servers(tell):
    story = tell(machines=5, min_ready=2, max_servers=3)
    wants = story.request(3)
    most = []
    story.run(
        lambda: most.append(len(story.nodes("building", "ready", "in-use"))) or story.state_of(wants) == "fulfilled"
    )
    story.run(limit=120)
    assert max(most) == 3
    assert "pool lab/main has all of its 3 servers in use" in story.daemon.planner.reasons["small"]


def test_a_machine_that_always_fails_is_broken_and_the_pool_takes_another(tell):
    story = tell(machines=2, min_ready=1, max_servers=2, failures={"lab-01": "write"})
    assert story.run(story.ready(1))
    assert story.nodes("ready")[0].machine == "lab-02"
    assert story.run(lambda: story.states()["lab-01"] == "broken")
    broken = story.machine("lab-01")
    assert (broken.failure_phase, broken.failure_code) == ("write", "disk-write")
    assert "input/output error" in broken.failure


def test_a_broken_machine_is_inspected_again_after_a_time_and_serves_when_it_is_mended(tell):
    story = tell(machines=1, min_ready=1, max_servers=1, failures={"lab-01": "agent"})
    assert story.run(lambda: story.states().get("lab-01") == "broken")
    story.world.machines["lab-01"].failing = ""
    assert story.run(story.ready(1), limit=2 * 3600)


def test_a_bmc_that_switches_nothing_is_a_power_failure(tell):
    story = tell(machines=1, max_servers=1, failures={"lab-01": "power-on"})
    assert story.run(lambda: story.states().get("lab-01") == "broken")
    assert story.machine("lab-01").failure_code == "power-stuck"


def test_a_system_that_nobody_can_log_in_to_is_not_ready(tell):
    story = tell(machines=1, max_servers=1, failures={"lab-01": "login"})
    assert story.run(lambda: any(node.failed_at for node in story.nodes()), limit=4 * 3600)
    assert story.nodes("ready") == []
    assert story.nodes()[0].failure_code == "login-silent"


def test_a_node_that_cannot_be_handed_over_goes_and_the_request_waits_for_another(tell):
    story = tell(machines=2, min_ready=1, max_servers=2, failures={"lab-01": "authorize"})
    story.run(story.ready(1))
    assert story.nodes("ready")[0].machine == "lab-01"
    wants = story.request(1, ssh_keys=("ssh-ed25519 AAAAuser me",))
    story.world.machines["lab-02"].failing = ""
    assert story.run(lambda: story.state_of(wants) == "fulfilled")
    assert story.nodes_of(wants)[0].machine == "lab-02"


def test_ready_nodes_that_are_too_old_are_replaced(tell):
    story = tell(machines=2, min_ready=1, max_servers=2, max_ready_age=600)
    story.run(story.ready(1))
    [old] = story.nodes("ready")
    assert story.run(lambda: [n.id for n in story.nodes("ready") if n.id != old.id], limit=1200)


def test_an_image_that_cannot_be_built_is_tried_again_less_and_less_often(tell):
    story = tell()
    story.broken_images.add("debian")
    story.run(limit=3600)
    failed = sorted(build.created_at for build in story.builds("failed"))
    gaps = [later - earlier for earlier, later in pairwise(failed)]
    assert 3 <= len(failed) < 10
    assert gaps == sorted(gaps)
    assert "image debian is not built yet" in story.daemon.planner.reasons["small"]


def test_images_are_built_anew_when_they_are_old_and_two_are_kept(tell):
    story = tell(min_ready=0)
    story.run(limit=5 * 86400 + 3600)
    assert len(story.builds("ready")) == 2
    assert len(list(story.folder.glob("*.raw"))) == 2


def test_an_image_whose_file_was_removed_is_built_again(tell):
    story = tell()
    story.run(story.ready(1))
    [build] = story.builds("ready")
    (story.folder / f"{build.id}.raw").unlink()
    assert story.run(lambda: [found.id for found in story.builds("ready")] not in ([], [build.id]), limit=300)


def test_files_of_stopped_builds_go_at_a_start_and_those_of_another_database_stay(tell):
    story = tell(min_ready=0)
    story.run(limit=60)
    left = story.folder / "images" / f"debian-{'ab' * 16}.raw"
    left.write_bytes(b"of a build that nobody knows")
    (story.folder / "images" / "database.id").write_text("somebody else's\n")
    story.restart()
    story.run(limit=60)
    assert left.exists()
    (story.folder / "images" / "database.id").write_text(story.store.write(images.database_id))
    story.restart()
    story.run(limit=60)
    assert not left.exists()


def test_a_machine_that_leaves_the_yaml_is_retired_after_its_use(tell):
    story = tell(machines=2, min_ready=1, max_servers=1)
    wants = story.request()
    story.run(lambda: story.state_of(wants) == "fulfilled")
    assert story.nodes_of(wants)[0].machine == "lab-01"
    story.reload(story.path.read_text().replace("count: 2", "machines: [{name: lab-02}]"))
    story.run(limit=60)
    assert story.machine("lab-01").retired
    assert story.state_of(wants) == "fulfilled"
    story.release(wants)
    story.run(limit=600)
    assert [machine.node_id for machine in story.all(Machine) if machine.name == "lab-02"] != [None]


def test_an_idle_pool_does_nothing(tell):
    story = tell()
    story.run(story.ready(1))
    story.run(limit=1000)  # by then the machines that nobody wants are switched off
    versions = [(machine.name, machine.version) for machine in story.all(Machine)]
    story.run(limit=1800)
    assert [(machine.name, machine.version) for machine in story.all(Machine)] == versions


def started(story):
    return [node.started_by for node in story.nodes("ready")]


def recycle(story):
    story.delete(story.nodes("ready")[0].id)
    return story.run(lambda: story.nodes("deleting") == [] and story.ready(1)(), limit=4 * 3600)


def test_the_first_node_of_a_build_starts_by_firmware_and_later_ones_by_kexec(tell):
    story = tell(machines=1, min_ready=1, max_servers=1)
    story.run(story.ready(1))
    assert started(story) == ["reboot"]
    machine = story.world.machines["lab-01"]
    before = machine.firmware_boots
    assert recycle(story)
    assert started(story) == ["kexec"]
    assert machine.firmware_boots == before + 1


def test_a_kexec_after_which_nothing_is_heard_is_not_tried_again_and_costs_no_strike(tell):
    story = tell(machines=1, min_ready=1, max_servers=1, failures={"lab-01": "kexec"})
    story.run(story.ready(1))
    assert recycle(story)
    assert started(story) == ["reboot"]
    assert story.machine("lab-01").strikes == 0
    [failed] = [o for o in story.all(Operation) if o.code == "kexec-failed"]
    assert recycle(story)
    assert [o.id for o in story.all(Operation) if o.code == "kexec-failed"] == [failed.id]


def test_a_label_that_says_reboot_is_never_started_by_kexec(tell):
    story = tell(machines=1, min_ready=1, max_servers=1)
    story.reload(story.path.read_text().replace("diskimage: debian}", "diskimage: debian, start: reboot}"))
    story.run(story.ready(1))
    assert recycle(story)
    assert started(story) == ["reboot"]


def test_an_available_machine_waits_warm_and_is_switched_off_when_nobody_wants_it(tell):
    story = tell(machines=1, min_ready=0, max_servers=1)
    assert story.run(lambda: story.states() == {"lab-01": "available"})
    story.run(limit=600)
    assert story.world.machines["lab-01"].on
    story.run(limit=600)
    assert not story.world.machines["lab-01"].on
    assert (story.machine("lab-01").power_observed, story.states()["lab-01"]) == ("off", "available")


def test_of_a_rack_only_so_many_machines_wait_warm(tell):
    story = tell(machines=4, min_ready=0, max_servers=4)
    story.reload(story.path.read_text().replace("    pools:", "    park-max: 1\n    pools:"))
    story.run(lambda: set(story.states().values()) == {"available"})
    story.run(limit=120)
    assert [machine.on for machine in story.world.machines.values()].count(True) == 1


def test_a_parked_machine_saves_a_self_test_and_one_that_was_switched_off_does_not(tell):
    story = tell(machines=1, min_ready=0, max_servers=1)
    story.run(lambda: story.states() == {"lab-01": "available"})
    machine = story.world.machines["lab-01"]
    assert machine.firmware_boots == 1
    wants = story.request()
    assert story.run(lambda: story.state_of(wants) == "fulfilled")
    assert machine.firmware_boots == 2  # only the first start of the build, by firmware
    story.release(wants)
    story.run(limit=2000)
    assert not machine.on
    before = machine.firmware_boots
    wants = story.request()
    assert story.run(lambda: story.state_of(wants) == "fulfilled")
    assert machine.firmware_boots == before + 1


def test_a_bmc_that_does_not_switch_off_what_waited_is_a_broken_machine(tell):
    story = tell(machines=1, min_ready=0, max_servers=1)
    story.run(lambda: story.states() == {"lab-01": "available"})
    story.world.machines["lab-01"].failing = "power-off"
    assert story.run(lambda: story.states()["lab-01"] == "broken")
    assert story.machine("lab-01").failure_phase == "switch-off"
