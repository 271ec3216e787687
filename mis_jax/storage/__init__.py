"""The only code that opens, writes, moves, removes and locks files: paths, folders, logs, hashes."""
