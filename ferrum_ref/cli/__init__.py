"""`ferrum-ref` on the command line: one file per subcommand, heavy imports inside `run`."""
