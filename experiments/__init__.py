"""The paper's claims and ablations, each a script that prints, draws and records what it finds."""
