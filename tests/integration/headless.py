"""Recipes of the tests of runs that take heads out of attentions."""

from tests.integration.support import RecipeEntries

GROUPS: RecipeEntries = [{"comp": {"depth_fraction": 0.0, "heads": 0.34}}]
QUERIES: RecipeEntries = [{"comp": {"depth_fraction": 0.0, "heads": 0.5, "head_unit": "query"}}]
THEN_WANDA: RecipeEntries = [{"comp": {"ratio": 0.4, "heads": 0.34, "multiple": 4}}, "wanda"]
