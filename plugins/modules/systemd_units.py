#!/usr/bin/python
"""Manage the systemd units of one owner."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.systemd import Units

DOCUMENTATION = r"""
module: systemd_units
short_description: Manage the systemd units of one owner
version_added: 0.1.0
description:
  - Writes unit files and drop-ins, removes units of the same owner that are no longer listed, enables and starts the others.
  - Restarts a unit whose process is older than its unit file or than a file in its O(units[].restart_on). Each run compares
    process and files again, so the next run completes a run that was killed between writing a file and the restart. A handler
    would be lost.
  - Starts all units in one call, so that systemd starts them in parallel. Waits until each unit is active and stays active for
    its O(units[].settle). If a unit does not, the module fails with the end of the unit's journal.
  - A target whose file changes is not restarted, since that would restart all its units.
options:
  owner:
    description: The owner of the units. Other units with this owner are stopped and removed.
    type: str
    required: true
  units:
    description: The units, in the order in which they are started.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The unit's full name, such as V(mailroom-web.service).
        type: str
        required: true
      content:
        description: The text of the unit file or of the drop-in.
        type: str
      packaged:
        description: Whether the unit comes from a package. O(units[].content) is then a drop-in.
        type: bool
        default: false
      shared:
        description: Whether the unit has several owners. It is then never removed.
        type: bool
        default: false
      restart_on:
        description: Files and symbolic links. A unit that started before one of them changed is restarted.
        type: list
        elements: path
        default: []
      reload_on:
        description:
          - Files and symbolic links. A unit is reloaded if one of them changed after the unit's last start or reload, or if its
            last reload failed.
        type: list
        elements: path
        default: []
      standby_of:
        description:
          - The unit that this unit replaces while that unit restarts. The module starts this unit before the restart, and stops it
            after the restarted unit is active again. Both use the same socket.
          - If this unit does not start, the other unit keeps running, and the module fails.
          - If the socket restarts too, this unit is not used.
        type: str
      on_demand:
        description: Whether another unit, such as a timer, starts this unit. The module then neither starts nor restarts it.
        type: bool
        default: false
      settle:
        description: Seconds for which the unit must stay active after a start.
        type: float
        default: 0
  directory:
    description: The directory of the unit files.
    type: path
    default: /etc/systemd/system
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: A web server that restarts with its release and its environment
  django_celery.stack.systemd_units:
    owner: mailroom/web
    units:
      - name: mailroom-web.service
        content: |
          [Service]
          Type=notify
          EnvironmentFile=/etc/mailroom.env
          ExecStart=/opt/mailroom/current/bin/gunicorn mailroom.wsgi
          [Install]
          WantedBy=multi-user.target
        restart_on:
          - /etc/mailroom.env
          - /opt/mailroom/current
        settle: 3

- name: A drop-in for a unit of a package
  django_celery.stack.systemd_units:
    owner: broker
    units:
      - name: rabbitmq-server.service
        packaged: true
        content: |
          [Service]
          LimitNOFILE=65536

- name: Stop and remove all units of an owner
  django_celery.stack.systemd_units:
    owner: mailroom/web
    units: []
"""

RETURN = r"""
started:
  description: Units that were not running.
  type: list
  elements: str
  returned: always
  sample: [mailroom-web.service]
restarted:
  description: Units that ran with older files.
  type: list
  elements: str
  returned: always
  sample: []
reloaded:
  description: Units that were reloaded.
  type: list
  elements: str
  returned: always
  sample: []
removed:
  description: Units that were no longer listed.
  type: list
  elements: str
  returned: always
  sample: []
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "owner": {"type": "str", "required": True},
            "directory": {"type": "path", "default": "/etc/systemd/system"},
            "units": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "content": {"type": "str"},
                    "packaged": {"type": "bool", "default": False},
                    "shared": {"type": "bool", "default": False},
                    "restart_on": {"type": "list", "elements": "path", "default": []},
                    "reload_on": {"type": "list", "elements": "path", "default": []},
                    "standby_of": {"type": "str"},
                    "on_demand": {"type": "bool", "default": False},
                    "settle": {"type": "float", "default": 0},
                },
            },
        },
        supports_check_mode=True,
    )
    units = Units(module)
    try:
        units.run()
    except Failure as failure:
        module.fail_json(msg=str(failure), **units.result)
    module.exit_json(**units.result)


if __name__ == "__main__":
    main()
