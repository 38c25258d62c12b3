"""The paper's theory and ablations, a script for each claim."""
