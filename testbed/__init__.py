"""Disposable systemd hosts for the sandbox and the Molecule scenarios. Production does not use this package.

See README.md.
"""
