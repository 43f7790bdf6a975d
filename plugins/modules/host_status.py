#!/usr/bin/python
"""Read the state of a host of an environment."""

from __future__ import annotations

from ansible_collections.django_celery.stack.plugins.module_utils.host_status import status
from ansible_collections.django_celery.stack.plugins.module_utils.unlogged import UnloggedModule

DOCUMENTATION = r"""
module: host_status
short_description: Read the state of a host of an environment
version_added: 0.2.0
description:
  - Reads services, versions, disks and certificates of a Linux host, and the state of the broker, the workers, the application and
    the backups on it. Changes nothing.
  - If a part can't be read, the module returns its error in RV(status.errors) and the other parts. Needs root.
options:
  app:
    description: The name of the application.
    type: str
    required: true
  controller_time:
    description: The controller's time in seconds since 1970, at the start of the task.
    type: float
    required: true
  units:
    description: The systemd units that must run. A name can be a pattern, such as C(postgresql*.service).
    type: list
    elements: str
    default: []
  disks:
    description: Paths of the file systems to report.
    type: list
    elements: path
    default: [/, /var]
  broker:
    description: The management API of the broker on this host.
    type: dict
    suboptions:
      url:
        description: The URL, without C(/api).
        type: str
        required: true
      ca_file:
        description: File on the host with the certificate authority of an HTTPS URL. The default is the host's trust store.
        type: path
      user:
        description: A user with the tag C(monitoring).
        type: str
        required: true
      password:
        description: The user's password.
        type: str
        required: true
      vhost:
        description: The virtual host with the queues to report.
        type: str
        required: true
  workers:
    description: The Celery workers on this host.
    type: dict
    suboptions:
      app:
        description: The Celery application.
        type: str
        required: true
      names:
        description: The names of the workers.
        type: list
        elements: str
        required: true
  command:
    description: A management command of the project that prints its state as a JSON object.
    type: str
    default: ""
  backups:
    description: The scheduled backups of this host.
    type: dict
    suboptions:
      file:
        description: The file with the times of the last successful backups, which the role backups writes.
        type: path
        required: true
      kinds:
        description: The kinds of data that the host backs up, C(postgresql) and C(rabbitmq).
        type: list
        elements: str
        required: true
  replication:
    description: The standbys of the PostgreSQL server on this host.
    type: dict
    suboptions:
      port:
        description: The server's port.
        type: int
        required: true
      standbys:
        description: The names of the standbys in the inventory.
        type: list
        elements: str
        required: true
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: Read the state of the host
  django_celery.stack.host_status:
    app: mailroom
    controller_time: 1795791600.0 # now().timestamp()
    units: [mailroom-web.service]
    command: email_status
"""

RETURN = r"""
status:
  description: The state, with one key per part.
  type: dict
  returned: always
  sample: {units: [{name: mailroom-web.service, state: active}], errors: {}}
"""


def main() -> None:
    module = UnloggedModule(
        argument_spec={
            "app": {"type": "str", "required": True},
            "controller_time": {"type": "float", "required": True},
            "units": {"type": "list", "elements": "str", "default": []},
            "disks": {"type": "list", "elements": "path", "default": ["/", "/var"]},
            "broker": {
                "type": "dict",
                "options": {
                    "url": {"type": "str", "required": True},
                    "ca_file": {"type": "path"},
                    "user": {"type": "str", "required": True},
                    "password": {"type": "str", "required": True, "no_log": True},
                    "vhost": {"type": "str", "required": True},
                },
            },
            "workers": {
                "type": "dict",
                "options": {
                    "app": {"type": "str", "required": True},
                    "names": {"type": "list", "elements": "str", "required": True},
                },
            },
            "command": {"type": "str", "default": ""},
            "backups": {
                "type": "dict",
                "options": {
                    "file": {"type": "path", "required": True},
                    "kinds": {"type": "list", "elements": "str", "required": True},
                },
            },
            "replication": {
                "type": "dict",
                "options": {
                    "port": {"type": "int", "required": True},
                    "standbys": {"type": "list", "elements": "str", "required": True},
                },
            },
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, status=status(module.params))


if __name__ == "__main__":
    main()
