"""Edits while the daemon runs."""

import logging
import os

import pytest

from nodepool.config import ConfigFile
from nodepool.errors import ConfigError


@pytest.fixture
def files(tmp_path):
    main, secure = tmp_path / "nodepool.yaml", tmp_path / "secure.yaml"
    main.write_text("version: 1\nlaunch-workers: 1\n")
    secure.write_text("credentials: []\n")
    secure.chmod(0o600)
    return main, secure


def write(path, text):
    """As editors do: a new file takes the old one's place."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o600)
    fresh.replace(path)


def test_a_daemon_does_not_start_on_a_broken_file(files):
    files[0].write_text("version: 2\n")
    with pytest.raises(ConfigError):
        ConfigFile(*files, env={})


def test_nothing_happens_while_nothing_changes(files):
    assert ConfigFile(*files, env={}).refresh() is None


def test_a_good_edit_is_in_force_at_once(files):
    config = ConfigFile(*files, env={})
    write(files[0], "version: 1\nlaunch-workers: 2\n")
    assert config.refresh() is config.current
    assert config.current.launch_workers == 2
    assert config.refresh() is None


def test_an_edit_of_the_secrets_is_seen(files):
    config = ConfigFile(*files, env={})
    write(files[1], "credentials: [{name: a, username: b, password: c}]\n")
    assert config.refresh().credentials["a"].password == "c"


def test_a_broken_edit_leaves_the_old_one_in_force_and_is_said_once(files, caplog):
    config = ConfigFile(*files, env={})
    old = config.current
    write(files[0], "version: 1\nlaunch-workers: many\nlabel: []\n")
    assert [config.refresh() for _ in range(3)] == [None, None, None]
    assert config.current is old
    assert len(config.problems) == 2
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert f"generation {old.generation} stays in force: 2 problems" in errors[0].getMessage()


def test_a_file_that_is_gone_for_a_moment_changes_nothing(files):
    config = ConfigFile(*files, env={})
    old = config.current
    kept = files[0].rename(files[0].with_suffix(".bak"))
    assert config.refresh() is None
    assert "no such file" in config.problems[0]
    kept.rename(files[0])
    assert config.refresh() is None
    assert config.problems == ()
    assert config.current is old


def test_a_broken_edit_that_is_mended_is_taken_over(files):
    config = ConfigFile(*files, env={})
    write(files[0], "version: 1\nlaunch-workers: many\n")
    config.refresh()
    write(files[0], "version: 1\nlaunch-workers: 3\n")
    assert config.refresh().launch_workers == 3
    assert config.problems == ()


def test_another_break_of_a_broken_file_is_said_too(files, caplog):
    config = ConfigFile(*files, env={})
    for value in ("many", "some"):
        write(files[0], f"version: 1\nlaunch-workers: {value}\n")
        config.refresh()
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2


def test_a_touch_is_no_new_generation(files):
    config = ConfigFile(*files, env={})
    os.utime(files[0], (1, 1))
    assert config.refresh() is None


def test_secrets_that_are_closed_again_are_taken_over(files):
    config = ConfigFile(*files, env={})
    files[1].chmod(0o644)
    assert config.refresh() is None
    assert "chmod 600" in config.problems[0]
    files[1].chmod(0o600)
    config.refresh()
    assert config.problems == ()


def test_warnings_are_logged_when_a_configuration_comes_into_force(files, caplog):
    files[0].write_text("version: 1\nlabels: [{name: lonely}]\n")
    ConfigFile(*files, env={})
    assert "labels[lonely].name: no pool offers this label" in caplog.text
