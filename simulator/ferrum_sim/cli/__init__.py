"""The command line `ferrum-sim`."""
