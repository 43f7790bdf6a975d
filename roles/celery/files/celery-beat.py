"""Runs Celery beat. Tells systemd that beat is ready, and then, with each loop of the scheduler, that it still works.

`celery beat` tells systemd nothing. A beat that hangs would stay active, and no periodic task would run.
"""

import os
import socket
import sys

from celery.__main__ import main
from celery.utils.imports import load_extension_class_names, symbol_by_name
from celery.utils.log import get_logger

_logger = get_logger("celery.beat")
# systemd restarts beat if no notification arrives within WATCHDOG_USEC: sd_notify(3). A busy host may delay a loop.
_INTERVAL = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 4


def _notify():
    # systemd ignores each READY after the first one.
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.connect("\0" + address[1:] if address.startswith("@") else address)
        notifications.sendall(b"READY=1\nWATCHDOG=1")


def scheduler(app, **arguments):
    """Return the scheduler of the project's setting beat_scheduler, with notifications. Beat calls this as a scheduler's class."""
    aliases = dict(load_extension_class_names("celery.beat_schedulers"))
    project_scheduler = symbol_by_name(app.conf.beat_scheduler, aliases=aliases)

    class NotifyingScheduler(project_scheduler):
        # Beat writes this name to its log.
        __qualname__ = project_scheduler.__qualname__
        __module__ = project_scheduler.__module__

        def tick(self, *args, **kwargs):
            delay = super().tick(*args, **kwargs)
            _notify()
            return min(delay, _INTERVAL) if delay and _INTERVAL else delay

        # While the broker does not respond, a loop does not end. Beat then waits, and systemd must not restart it.
        def _ensure_connected(self):
            def failed(error, seconds):
                _logger.error("beat: Connection error: %s. Trying again in %s seconds...", error, seconds)
                _notify()

            return self.connection.ensure_connection(failed, app.conf.broker_connection_max_retries)

    return NotifyingScheduler(app=app, **arguments)


if __name__ == "__main__":
    sys.argv[0] = "celery"
    sys.exit(main())
