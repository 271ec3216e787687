"""Files and folders: whole or plainly not, locked, hashed; JSON of outside read with errors."""
