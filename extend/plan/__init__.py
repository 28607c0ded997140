"""What an extension would do, before anything runs."""

from extend.plan.plan import Plan, plan, write_plan

__all__ = ["Plan", "plan", "write_plan"]
