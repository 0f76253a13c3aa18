"""kill -9 between any two writes: the daemon that comes after goes on to the same end."""

import pytest
from sqlalchemy import event
from story import Story

from nodepool.model import Machine, Operation, OperationState


class Killed(BaseException):
    """The process is gone."""


class Mortal(Story):
    """A daemon that dies at its n-th write: before it is committed (`late` False) or right after it."""

    def __init__(self, folder, *, dies_at, late, **kinds):
        self.writes = 0
        self.dies_at = dies_at
        self.late = late
        super().__init__(folder, **kinds)

    def start(self):
        super().start()
        event.listen(self.store.engine, "commit", lambda _connection: self.count(late=False))
        self.store.wake.append(lambda: self.count(late=True))

    def count(self, *, late):
        if late is not self.late:
            return
        self.writes += 1
        if self.writes == self.dies_at:
            raise Killed

    def survive(self, act):
        """What a person or a service manager does: start it again, and ask again."""
        try:
            return act()
        except Killed:
            self.restart()
            return act()


def the_whole_round(story):
    """Fill, request with keys, use, release, fill again; every call of the user may be repeated."""
    story.survive(lambda: story.run(story.ready(1)))
    wants = story.survive(lambda: story.request(1, client_token="mine", ssh_keys=("ssh-ed25519 AAAAuser me",)))
    assert story.survive(lambda: story.run(lambda: story.state_of(wants) == "fulfilled"))
    [node] = story.nodes_of(wants)
    story.world.machines[node.machine].marker = "left by its user"
    story.survive(lambda: story.release(wants))
    assert story.survive(lambda: story.run(story.ready(1)))
    return wants


def end_of(story, wants):
    """What must be the same however the daemon died."""
    return {
        "request": story.state_of(wants),
        "machines": story.states(),
        "ready": len(story.nodes("ready")),
        "markers": [machine.marker for machine in story.world.machines.values()],
        "broken": [machine.name for machine in story.all(Machine) if machine.failure or machine.strikes],
        "in hand": len(
            [o for o in story.all(Operation) if o.state in {OperationState.PENDING, OperationState.RUNNING}]
        ),
    }


@pytest.mark.parametrize("late", [False, True], ids=["before-the-commit", "after-the-commit"])
def test_killed_between_any_two_writes_it_goes_on_to_the_same_end(tmp_path, late):
    (tmp_path / "whole").mkdir()
    whole = Mortal(tmp_path / "whole", dies_at=0, late=late, machines=1, max_servers=1)
    expected = end_of(whole, the_whole_round(whole))
    whole.die()
    assert expected["in hand"] == 0
    differ = {}
    for write in range(1, whole.writes + 1):
        folder = tmp_path / str(write)
        folder.mkdir()
        try:
            story = Mortal(folder, dies_at=write, late=late, machines=1, max_servers=1)
        except Killed:
            continue  # it had not begun: there is nothing to go on with
        end = end_of(story, the_whole_round(story))
        story.die()
        if end != expected:
            differ[write] = end
    assert not differ
