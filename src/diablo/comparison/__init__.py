"""A fair comparison of methods: equal trained parameters, a learning rate chosen for each, several seeds."""

from diablo.comparison.plan import Comparison, Contender, plan_comparison
from diablo.comparison.runner import compare

__all__ = ["Comparison", "Contender", "compare", "plan_comparison"]
