"""The REST API and its pages: thin adapters over `service`."""
