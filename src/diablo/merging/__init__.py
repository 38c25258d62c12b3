"""Merging an adapter into a plain model: file by file where the base weights are plain, and as a whole elsewhere."""

from diablo.merging.merge import CHOICES, MergeReport, merge_adapter

__all__ = ["CHOICES", "MergeReport", "merge_adapter"]
