"""What is known and checked before a weight is loaded: the plan of a run, and what a model would take."""
