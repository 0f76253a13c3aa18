"""nodepool: keeps pools of bare-metal machines ready."""

__version__ = "0.1.0"
