#!/usr/bin/python
"""Inspect a host before the installation."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.django_celery.stack.plugins.module_utils.preflight import memory_problems, problems

DOCUMENTATION = r"""
module: preflight
short_description: Inspect a host before the installation
version_added: 0.1.0
description:
  - Reports each problem of a Linux host that would make a later installation fail, with its remedy. Changes nothing.
  - Queries the package sources of apt or dnf with their configuration. Needs root for these queries and for the owners of ports.
options:
  disk:
    description: Gigabytes of free space that each directory needs.
    type: dict
    default: {}
  memory:
    description: Megabytes of memory that the host should have.
    type: int
    default: 0
  controller_time:
    description: The controller's time in seconds since 1970, at the start of the task.
    type: float
    required: true
  clock:
    description: Seconds by which the clocks may differ. The start of the task adds up to a few seconds to the difference.
    type: float
    required: true
  names:
    description: Names of other hosts, which must resolve.
    type: list
    elements: str
    default: []
  ports:
    description: TCP ports, each with a regular expression of the systemd units that may use it.
    type: dict
    default: {}
  package_sources:
    description: Whether the package sources of apt or dnf must respond.
    type: bool
    default: true
  urls:
    description: URLs that must respond, with any status.
    type: list
    elements: str
    default: []
  mail_server:
    description: A mail server that must respond to EHLO.
    type: dict
    suboptions:
      host:
        description: The name or address.
        type: str
        required: true
      port:
        description: The port.
        type: int
        required: true
      tls:
        description: Whether the connection begins with TLS.
        type: bool
        default: false
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: Inspect the host
  django_celery.stack.preflight:
    disk: {/var: 4}
    memory: 1800
    controller_time: 1795791600.0 # now().timestamp()
    clock: 30
    names: [db1.example.com]
    ports: {"5432": 'postgresql.*'}
    urls: [https://index.example.com/simple/]
    mail_server: {host: smtp.example.com, port: 587}
"""

RETURN = r"""
problems:
  description: One or two sentences per problem.
  type: list
  elements: str
  returned: always
  sample: ["Port 5432 is used by other.service. Stop it, or choose another port for one of them."]
warned:
  description: Problems with O(memory). These problems are warnings, since a host may work with less memory.
  type: list
  elements: str
  returned: always
  sample: []
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "disk": {"type": "dict", "default": {}},
            "memory": {"type": "int", "default": 0},
            "controller_time": {"type": "float", "required": True},
            "clock": {"type": "float", "required": True},
            "names": {"type": "list", "elements": "str", "default": []},
            "ports": {"type": "dict", "default": {}},
            "package_sources": {"type": "bool", "default": True},
            "urls": {"type": "list", "elements": "str", "default": []},
            "mail_server": {
                "type": "dict",
                "options": {
                    "host": {"type": "str", "required": True},
                    "port": {"type": "int", "required": True},
                    "tls": {"type": "bool", "default": False},
                },
            },
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, problems=problems(module.params), warned=list(memory_problems(module.params["memory"])))


if __name__ == "__main__":
    main()
