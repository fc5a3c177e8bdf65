"""The command line: options, parsing, commands and terminal output. Heavy imports happen inside commands."""
