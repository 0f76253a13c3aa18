"""The planner: what is wanted, from the configuration and what there is; pure."""

from nodepool.plan.actions import Action, Plan
from nodepool.plan.catalog import Catalog, catalog
from nodepool.plan.planner import plan, why_impossible
from nodepool.plan.snapshot import Snapshot

__all__ = ["Action", "Catalog", "Plan", "Snapshot", "catalog", "plan", "why_impossible"]
