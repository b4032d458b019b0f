"""The command line: a file a command. What takes seconds to import is imported where a command begins."""
