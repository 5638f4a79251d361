"""Plugins: the hooks that there are, what is registered through them, and whose fault it is when plugin code fails.

Goes here: everything between an installed package and the name that users type. A new hook is specified in
`hookspecs`; what it registers is looked up in `registry`.
"""
