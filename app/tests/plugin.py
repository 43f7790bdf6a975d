"""Starts the PostgreSQL server of a test run, before Django's settings are read."""

import atexit
import os

from tests.postgresql import Postgresql

if "TEST_DATABASE_URL" not in os.environ:
    # Test data does not have to survive a crash.
    server = Postgresql(fsync="off")
    server.start()
    atexit.register(server.__exit__)
    os.environ["TEST_DATABASE_URL"] = server.url()
