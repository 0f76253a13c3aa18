"""Files that cannot be read, and secrets that others could."""

import os
import sys

import pytest

from nodepool.config import load
from nodepool.errors import ConfigError

MAIN = "version: 1\n"


@pytest.fixture
def main(tmp_path):
    path = tmp_path / "nodepool.yaml"
    path.write_text(MAIN)
    return path


@pytest.fixture
def secure(tmp_path):
    def write(text, mode=0o600):
        path = tmp_path / "secure.yaml"
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def problems_of(path, secure=None):
    with pytest.raises(ConfigError) as caught:
        load(path, secure, {})
    return caught.value.problems


def test_a_missing_file_is_named(tmp_path):
    assert problems_of(tmp_path / "none.yaml") == (
        f"{tmp_path}/none.yaml: found no such file; allowed: the path of a YAML file",
    )


def test_a_folder_is_no_configuration(tmp_path):
    assert "found a directory; allowed: a plain file" in problems_of(tmp_path)[0]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "found a pipe or device; allowed: a plain file" in problems_of(tmp_path / "pipe")[0]


def test_a_name_that_no_file_can_have_is_refused():
    assert "cannot be read" in problems_of("a\0b")[0]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_file_that_this_user_may_not_read_is_named(main):
    main.chmod(0o000)
    main.parent.chmod(0o755)
    for parent in main.parent.parents:
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    os.seteuid(65534)
    try:
        problems = problems_of(main)
    finally:
        os.seteuid(0)
    assert "Permission denied; allowed: a file that this user may read" in problems[0]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_secrets_that_others_may_use_are_refused_with_the_remedy(main, secure, mode):
    path = secure("credentials: []\n", mode)
    (problem,) = problems_of(main, path)
    assert f"{path}: refused: it holds secrets and others may use it (mode {mode:04o})" in problem
    assert problem.endswith(f"; allowed: mode 0600; remedy: chmod 600 {path}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_secrets_that_belong_to_somebody_else_are_refused(main, secure):
    path = secure("credentials: []\n")
    os.chown(path, 65534, -1)
    assert "belongs to user 65534" in problems_of(main, path)[0]


def test_missing_secrets_are_one_problem(main, tmp_path):
    assert len(problems_of(main, tmp_path / "secure.yaml")) == 1


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_a_secrets_file_without_secrets_is_fine(main, secure, text):
    assert load(main, secure(text), {}).credentials == {}


LONG = "hunter2-hunter2-hunter2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"credentials: [{{name: a, username: b, password: {LONG}}}]\n", "a password of at most 20 bytes"),
        (f"credentials: [{{name: a, username: {LONG}, password: c}}]\n", "a user name of at most 16 bytes"),
        (f"credentials: [{{name: a, username: b, passwrd: {LONG}}}]\n", "did you mean 'password'?"),
        (f"credentials: [{{name: a, username: b, {LONG}: c}}]\n", "credentials[a].?: found an unknown key"),
        (f"credentials: [{LONG}]\n", "credentials[0]: found a value that does not fit"),
        (f"{LONG}\n", "found a value that does not fit"),
        (f"credentials:\n  - name: a\n    password:{LONG}\n    username: b\n", "found what YAML cannot read"),
        (f"credentials:\n  - name: a\n    password: *{LONG}\n", "found what YAML cannot read"),
        (f"credentials:\n  - name: a\n    password: !{LONG} x\n", "found the tag"),
        (f"database: mysql://u:{LONG}@db/n\n", "database: found another kind of address"),
        (f"database: {{u: {LONG}}}\n", "database: found another kind of address"),
        (f"diskimages: [{{name: x, env-vars: {{A: {LONG}}}}}]\n", "one of the diskimages"),
        (f"diskimages: [{{name: x, env-vars: {{A: [{LONG}]}}}}]\n", "diskimages[x].env-vars.A: found a list"),
        ("credentials: [{name: a, username: b, password: c}, {name: a, username: b, password: c}]\n", "again"),
    ],
)
def test_problems_with_secrets_name_the_place_and_show_no_secret(main, secure, text, words):
    problems = "\n".join(problems_of(main, secure(text)))
    assert words.replace("one of the diskimages", "a diskimage of the configuration") in problems
    assert "hunter2" not in problems


def test_a_password_of_twenty_bytes_fits(main, secure):
    path = secure("credentials: [{name: a, username: 1234567890123456, password: 12345678901234567890}]\n")
    assert load(main, path, {}).credentials["a"].password == "12345678901234567890"


def test_bytes_are_counted_and_not_letters(main, secure):
    path = secure("credentials: [{name: a, username: b, password: ääääääääääb}]\n")
    assert "at most 20 bytes" in problems_of(main, path)[0]


def test_problems_of_both_files_are_told_together(main, secure):
    main.write_text("version: 1\nlabel: []\n")
    problems = problems_of(main, secure("credentials: 3\n"))
    assert [problem.split(":")[0] for problem in problems] == [str(main), str(main.parent / "secure.yaml")]


def test_text_deep_enough_to_crash_a_parser_is_refused(main):
    main.write_text("a: " + "[" * 300_000)
    assert "levels without end" in problems_of(main)[0]


def test_a_chain_of_merges_without_end_is_refused(main):
    main.write_text("a0: &a0 {}\n" + "".join(f"a{n}: &a{n} {{<<: *a{n - 1}}}\n" for n in range(1, 3000)))
    assert "levels without end" in problems_of(main)[0]
