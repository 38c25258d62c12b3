"""Trainers: one for each objective, on TRL's, with what all of them have in common in one place."""
