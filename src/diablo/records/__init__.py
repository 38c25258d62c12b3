"""Records of runs: settings, machine, versions and results, model cards, and progress on the terminal."""
