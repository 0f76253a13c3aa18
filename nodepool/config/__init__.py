"""The configuration: YAML in, frozen records or all the errors at once out."""

from nodepool.config.reader import Loaded, load, load_checked
from nodepool.config.watch import ConfigFile

__all__ = ["ConfigFile", "Loaded", "load", "load_checked"]
