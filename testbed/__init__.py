"""Disposable systemd hosts for the sandbox and for every Molecule scenario.

Nothing in here is used in production; see README.md.
"""
