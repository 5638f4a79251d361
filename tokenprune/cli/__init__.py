"""The command line: the program, and what its commands share.

Goes here: the app (`app`), the commands that plugins add (`mounting`), options, checks and output that several commands
have in common. A new command is a module in `commands/`.
"""
