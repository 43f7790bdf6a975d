"""Settings of gunicorn. A worker tells systemd that the service is ready when it has loaded the application.

gunicorn itself notifies systemd before its workers load the application, so a restart would end too early.
"""

import os
import runpy

from gunicorn import systemd

# gunicorn's default settings file, in the project. Its settings apply too.
if os.path.exists("gunicorn.conf.py"):
    globals().update(runpy.run_path("gunicorn.conf.py"))

_project_hook = globals().get("post_worker_init")
# Without this variable, gunicorn sends no notification.
_notify_socket = os.environ.pop("NOTIFY_SOCKET", "")


def post_worker_init(worker):
    if _project_hook:
        _project_hook(worker)
    if _notify_socket:
        os.environ["NOTIFY_SOCKET"] = _notify_socket
        systemd.sd_notify("READY=1", worker.log, unset_environment=True)
