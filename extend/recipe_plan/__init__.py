"""What a recipe takes: time, memory, disk and downloads of every stage, before it runs."""

from extend.recipe_plan.plan import RecipePlan, plan_recipe
from extend.recipe_plan.report import plan_json, plan_text

__all__ = ["RecipePlan", "plan_json", "plan_recipe", "plan_text"]
