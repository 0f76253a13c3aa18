"""`nodepool config-validate`, which needs no daemon."""

import argparse
import subprocess
import sys

import pytest

from nodepool.cmd import config_validate


@pytest.fixture
def validate():
    parser = argparse.ArgumentParser()
    config_validate.add_arguments(parser)
    return lambda *words: config_validate.run(parser.parse_args([str(word) for word in words]))


def test_a_good_file_is_one_sentence_and_status_0(validate, tmp_path, capsys):
    path = tmp_path / "good.yaml"
    path.write_text("version: 1\n")
    assert validate("-c", path) == 0
    assert capsys.readouterr().out.startswith(
        f"{path} is good: 0 providers, 0 machines, 0 labels, 0 diskimages, 0 networks; generation "
    )


def test_a_broken_file_is_all_its_problems_and_status_1(validate, tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text("version: 1\nlabels: 3\nlabel: 4\n")
    assert validate("-c", path) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "2 problems"
    assert len(captured.err.splitlines()) == 3


def test_warnings_do_not_fail(validate, tmp_path, capsys):
    path = tmp_path / "lonely.yaml"
    path.write_text("version: 1\nlabels: [{name: lonely}]\n")
    assert validate("-c", path) == 0
    assert capsys.readouterr().err.startswith("warning: ")


def test_secrets_are_looked_at_too(validate, tmp_path, capsys):
    path = tmp_path / "good.yaml"
    path.write_text("version: 1\n")
    assert validate("-c", path, "-s", tmp_path / "none.yaml") == 1
    assert "none.yaml: found no such file" in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    script = (
        "import sys, nodepool.cmd.config_validate, nodepool.config\n"
        "print([name for name in ('sqlalchemy', 'fastapi', 'aiohttp', 'asyncssh', 'kazoo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
