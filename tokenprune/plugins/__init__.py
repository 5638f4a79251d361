"""Plugins: the hooks, the registry of what they register, and the errors that name a plugin when its code fails.

Goes here: everything between an installed package and the name that users type. A new hook is specified in
`hookspecs`; a new kind of thing to register is listed in `entries`, and `registry` looks it up.
"""
