"""A fair comparison of methods: equal trained parameters, a learning rate chosen for each, several seeds."""

from diablo.comparison.grids import parse_rates
from diablo.comparison.plan import DEFAULT_METHODS, Comparison, plan_comparison
from diablo.comparison.runner import compare

__all__ = ["DEFAULT_METHODS", "Comparison", "compare", "parse_rates", "plan_comparison"]
