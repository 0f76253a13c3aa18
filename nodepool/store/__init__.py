"""The store: the truth about every row, in SQLite or MySQL/MariaDB."""

from nodepool.store.engine import Store, open_store
from nodepool.store.transaction import Office, Tx

__all__ = ["Office", "Store", "Tx", "open_store"]
