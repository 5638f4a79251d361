"""The commands, one module each.

Goes here: a function `command`, which `app` registers, with typer and the standard library at the top of its module and
everything heavy imported inside the function. A command that does not belong to tokenprune itself is a plugin's.
"""
