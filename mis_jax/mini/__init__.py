"""The drawn world of the quickstart: scenes, language and files."""
