"""Makes the scenario tests' Story importable here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "scenario"))

from story import Story, yaml_of  # noqa: F401
