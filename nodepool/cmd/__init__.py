"""The programs: the only place that wires concrete parts together."""
