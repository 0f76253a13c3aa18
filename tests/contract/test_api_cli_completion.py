"""Shell completion: what bash and zsh offer, asked of the shells themselves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from api_pool import served

from nodepool.cmd.cli import COMMANDS, LOCAL, main

SCRIPT = '#!/bin/sh\nexec {python} -c "import sys; from nodepool.cmd.cli import main; sys.exit(main())" "$@"\n'
ASK = """\
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_nodepool
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with served(tmp_path_factory.mktemp("completion")) as pool:
        pool.until("ready")
        yield pool


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where `nodepool` is found, as if it were installed."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "nodepool"
    command.write_text(SCRIPT.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return tmp_path


@pytest.fixture
def offered(pool, path, monkeypatch, capsys):
    """What bash offers after these words, of which the last is being typed."""
    monkeypatch.setenv("NODEPOOL_URL", str(pool.path))
    assert main(["completion", "bash"]) == 0
    script = path / "completion"
    script.write_text(capsys.readouterr().out)

    def ask(*words):
        done = subprocess.run(
            ["bash", "-c", ASK, "ask", str(script), "nodepool", *words], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout.split()

    return ask


def test_every_command_is_offered(offered):
    assert {*COMMANDS, *LOCAL} <= set(offered(""))
    assert offered("machine-a") == ["machine-accept"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["list", "--det"], ["--detail"]),
        (["list", "--format", ""], ["table", "json", "yaml", "csv"]),
        (["--format", "=", "y"], ["yaml"]),
        (["--format", "=", "json", "expl"], ["explain"]),
        (["list", "--state", "in"], ["in-use"]),
        (["request-list", "--state", "re"], ["requested", "released"]),
        (["show", "lab-0"], ["lab-01", "lab-02", "lab-03"]),
        (["show", "1"], ["1"]),
        (["hold", "--reason", "why", "1"], ["1"]),
        (["machine-accept", "lab-02"], ["lab-02"]),
        (["request", "s"], ["small"]),
        (["list", "--provider", ""], ["lab"]),
        (["image-build", "d"], ["debian"]),
        (["agent-build", "--kernel"], ["--kernel-package"]),
    ],
)
def test_what_fits_is_offered(offered, words, found):
    assert offered(*words) == found


def test_without_a_daemon_only_options_are_offered(offered, monkeypatch):
    monkeypatch.setenv("NODEPOOL_URL", "/nonexistent/np.sock")
    assert offered("show", "") == ["-h", "--help", "--url", "--format", "--watch"]


def test_names_that_shells_would_take_apart_are_left_out(pool, capsys):
    assert main(["--url", str(pool.path), "completion", "words", "secrets"]) == 0
    assert capsys.readouterr().out == ""


def test_the_bash_script_is_clean(path, capsys):
    shellcheck = shutil.which("shellcheck")
    assert shellcheck, "install shellcheck (bindep.txt)"
    main(["completion", "bash"])
    (path / "script").write_text(capsys.readouterr().out)
    done = subprocess.run([shellcheck, "-s", "bash", path / "script"], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_by_its_own_functions(pool, path, monkeypatch, capsys):
    monkeypatch.setenv("NODEPOOL_URL", str(pool.path))
    main(["completion", "zsh"])
    script = path / "_nodepool"
    script.write_text(capsys.readouterr().out)
    asked = f"""
    zmodload zsh/zpty
    zpty shell zsh -f -i
    zpty -w shell 'PS1=; unsetopt zle_bracketed_paste; fpath=({path} $fpath); autoload -U compinit; compinit -D -u'
    zpty -w shell 'bindkey "^I" complete-word; echo ready-$((1+1))'
    zpty -m -r shell line '*ready-2*'
    zpty -w -n shell $'nodepool explain sm\\t'
    zpty -m -r shell line '*explain small*' && print completed-label
    zpty -w -n shell $'\\x15nodepool machine-acc\\t'
    zpty -m -r shell line '*machine-accept*' && print completed-command
    zpty -d shell
    """
    done = subprocess.run(["zsh", "-f", "-c", asked], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["completed-label", "completed-command"], done.stderr
