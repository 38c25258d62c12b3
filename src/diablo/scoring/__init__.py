"""Scores of a model: by generation, by likelihood, by loss, and through lm-evaluation-harness."""
