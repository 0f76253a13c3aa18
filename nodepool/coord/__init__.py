"""Who may act: one protocol, in-process here, ZooKeeper later."""
