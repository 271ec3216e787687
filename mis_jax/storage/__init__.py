"""The only code that opens, writes, moves and removes files: paths, folders, logs, locks."""
