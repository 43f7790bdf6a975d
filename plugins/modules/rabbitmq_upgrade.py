#!/usr/bin/python
"""Find the reasons against an upgrade of RabbitMQ on a host."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.host_state import installed_versions
from ansible_collections.django_celery.stack.plugins.module_utils.management_api import ManagementApi
from ansible_collections.django_celery.stack.plugins.module_utils.masking import masked
from ansible_collections.django_celery.stack.plugins.module_utils.rabbitmq_upgrade import (
    MIGRATE,
    data_refusal,
    flags_of_data,
    is_upgrade,
    offline_refusal,
    running_refusals,
)
from ansible_collections.django_celery.stack.plugins.module_utils.rabbitmq_versions import upstream

DOCUMENTATION = r"""
module: rabbitmq_upgrade
short_description: Find the reasons against an upgrade of RabbitMQ
version_added: 0.2.0
description:
  - Compares the installed package and the data of the node with the wanted version. If the wanted version differs from the
    installed one, also asks the running broker for nodes that are not running, alarms, queues without a majority, queues with an
    old machine version, and disabled feature flags.
  - Changes nothing. Needs root.
options:
  version:
    description: The wanted version or series.
    type: str
    required: true
  erlang:
    description: The wanted version of Erlang.
    type: str
    required: true
  data:
    description: The directory with the data of the nodes.
    type: path
    required: true
  paths:
    description: For each series, the series whose data it can read.
    type: dict
    required: true
  required_flags:
    description: For each series, the feature flags without which it does not start.
    type: dict
    required: true
  compatibility:
    description: The versions of Erlang for each version of RabbitMQ, newest first.
    type: list
    elements: dict
    required: true
  url:
    description: The base URL of the management API.
    type: str
    required: true
  ca_file:
    description: The certificate authority of an HTTPS URL.
    type: path
  administrator:
    description: The user of the management API.
    type: str
    required: true
  password:
    description: The password of the user.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Look for reasons against the upgrade
  django_celery.stack.rabbitmq_upgrade:
    version: "4.3"
    erlang: "27"
    data: /var/lib/rabbitmq/mnesia
    paths: {"4.3": ["4.2", "4.3"]}
    required_flags: {"4.3": [khepri_db]}
    compatibility:
      - {since: 4.3.0, erlang: ["27"], paired: []}
    url: http://127.0.0.1:15672
    administrator: admin
    password: "{{ vault_administrator_password }}"
"""

RETURN = r"""
installed:
  description: The installed version, or an empty string.
  type: str
  returned: always
  sample: 4.0.5
refusal:
  description: The reasons against the upgrade, or an empty string.
  type: str
  returned: always
  sample: "The node rabbit@mq1 has a memory alarm."
migration:
  description: Whether the playbook migrate_rabbitmq.yml can move the broker to the wanted version.
  type: bool
  returned: always
unreadable:
  description: Whether the installed RabbitMQ does not start with the data of the node.
  type: bool
  returned: always
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "erlang": {"type": "str", "required": True},
            "data": {"type": "path", "required": True},
            "paths": {"type": "dict", "required": True},
            "required_flags": {"type": "dict", "required": True},
            "compatibility": {"type": "list", "elements": "dict", "required": True},
            "url": {"type": "str", "required": True},
            "ca_file": {"type": "path"},
            "administrator": {"type": "str", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    installed = upstream(installed_versions(["rabbitmq-server"]).get("rabbitmq-server", ""))
    enabled = flags_of_data(wanted["data"])
    refusal = offline_refusal(
        installed, wanted["version"], wanted["erlang"], enabled, wanted["paths"], wanted["required_flags"], wanted["compatibility"]
    )
    unreadable = bool(data_refusal(wanted["required_flags"], installed or wanted["version"], enabled))
    if not refusal and is_upgrade(installed, wanted["version"]):
        api = ManagementApi(wanted["url"], wanted["administrator"], wanted["password"], 0, wanted["ca_file"])
        try:
            refusal = " ".join(running_refusals(api))
        except Failure as failure:
            refusal = masked(f"The broker must run before its upgrade, so that its queues can be checked. {failure}")
    module.exit_json(changed=False, installed=installed, refusal=refusal, migration=MIGRATE in refusal, unreadable=unreadable)


if __name__ == "__main__":
    main()
