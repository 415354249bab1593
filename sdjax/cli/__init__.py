"""The command `sdjax`: argument parsing and printing."""
