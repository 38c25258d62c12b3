"""Recipes: what a run is told, the checks of it, the methods that it can name, and the recipes that are shipped."""
