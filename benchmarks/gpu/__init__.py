"""Everything that a GPU is asked, in one command: ``python -m benchmarks.gpu``."""
