"""Records of runs: settings, machine, versions and results; and progress on the terminal."""
