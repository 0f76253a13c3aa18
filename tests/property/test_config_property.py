"""Whatever stands in the files: a Config, or a ConfigError with readable problems; never anything else."""

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from nodepool.config import load
from nodepool.config.records import Config
from nodepool.config.where import WhereError, parse
from nodepool.errors import ConfigError

SAMPLE = (Path(__file__).parents[2] / "nodepool.yaml.sample").read_text()
SECRETS = "credentials:\n  - {name: rack1, username: admin, password: xyzzy-42}\n"
LINES = SAMPLE.splitlines()
PIECES = ["&a ", "*a", "<<: *a", "[", "]", "{", "}", "- ", ": ", "!x ", "%(NODEPOOL_X)", "~", "'", '"', "\t", "0", "-1"]
PIECES += ["null", "|\n", ">\n", "? ", "---\n", "...", "#", "é", "\x07", "1e9", "name", "in (", "and"]


def outcome(text, secrets=None):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nodepool.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        secure = None
        if secrets is not None:
            secure = Path(folder) / "secure.yaml"
            secure.write_text(secrets)
            secure.chmod(0o600)
        try:
            result = load(path, secure, {})
        except ConfigError as error:
            result = error
    assert isinstance(result, Config) or result.problems
    for problem in getattr(result, "problems", ()):
        assert "\n" not in problem
        assert "found" in problem
        assert "allowed: " in problem
    return result


@given(st.binary(max_size=300))
def test_any_bytes(content):
    outcome(content)


@given(st.text(alphabet=st.sampled_from("[]{}:-,*&!|>%'\"#?@`~ \n\tabc01<="), max_size=200))
def test_any_text_of_yaml_characters(text):
    outcome("version: 1\n" + text)


@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_mixture_of_yaml_tokens(pieces):
    outcome("".join(pieces))


@st.composite
def mutations(draw):
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 6))):
        position = draw(st.integers(0, len(lines) - 1))
        line = lines[position]
        match draw(st.sampled_from(["drop", "repeat", "swap", "insert", "cut", "indent", "value"])):
            case "drop":
                del lines[position]
            case "repeat":
                lines.insert(position, line)
            case "swap":
                other = draw(st.integers(0, len(lines) - 1))
                lines[position], lines[other] = lines[other], line
            case "insert":
                column = draw(st.integers(0, len(line)))
                lines[position] = line[:column] + draw(st.sampled_from(PIECES)) + line[column:]
            case "cut":
                lines[position] = line[: draw(st.integers(0, len(line)))]
            case "indent":
                lines[position] = " " * draw(st.integers(0, 12)) + line.lstrip()
            case "value":
                lines[position] = line.split(":")[0] + ": " + draw(st.sampled_from(PIECES))
    return "\n".join(lines) + "\n"


@settings(deadline=None)
@given(mutations())
def test_any_damage_to_the_sample(text):
    outcome(text, SECRETS)


TOP = ["networks", "diskimages", "labels", "providers", "statsd", "database"]
KEYS = ["name", "driver", "pools", "labels", "machines", "where", "count", "diskimage", "interfaces", "min-ready"]
SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
SCALARS |= st.sampled_from(["fake", "metal", "main", "p-01", "198.51.100.1", "name == a"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(TOP), VALUES))
def test_any_value_under_the_known_keys(data):
    outcome("version: 1\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in data.items()))


@settings(deadline=None)
@given(st.data())
def test_no_damage_to_the_secrets_shows_a_password(data):
    position = data.draw(st.integers(0, len(SECRETS)))
    piece = data.draw(st.sampled_from(PIECES))
    # The password itself stays whole, so that it can be looked for.
    start = SECRETS.index("xyzzy-42")
    if start < position < start + len("xyzzy-42"):
        position = start
    error = outcome("version: 1\n", SECRETS[:position] + piece + SECRETS[position:])
    assert "xyzzy-42" not in (str(error) if isinstance(error, ConfigError) else repr(error))


@given(st.text(alphabet=st.sampled_from("ab=!()'\", andornti"), max_size=60))
def test_any_expression_is_understood_or_refused(text):
    try:
        answer = parse(text).matches({"a": "b"})
    except WhereError as error:
        answer = "allowed: " in str(error)
    assert isinstance(answer, bool)
