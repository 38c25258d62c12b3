"""A merged model: file by file where the base weights are plain, as a whole where they are quantized."""

from diablo.merging.merge import CHOICES, MergeReport, merge_adapter

__all__ = ["CHOICES", "MergeReport", "merge_adapter"]
