"""The use cases, each a function that runs in one transaction."""
