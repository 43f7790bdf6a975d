#!/usr/bin/python
"""Manage the definitions of a RabbitMQ broker."""

from __future__ import annotations

from ansible_collections.django_celery.stack.plugins.module_utils.broker import Broker
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.management_api import NoAnswer
from ansible_collections.django_celery.stack.plugins.module_utils.masking import masked, uri_passwords
from ansible_collections.django_celery.stack.plugins.module_utils.unlogged import UnloggedModule

DOCUMENTATION = r"""
module: rabbitmq_definitions
short_description: Manage the definitions of a RabbitMQ broker
version_added: 0.1.0
description:
  - Compares virtual hosts, users, permissions, policies, parameters, exchanges, queues and bindings with those of the broker. One
    request to the management API reads all objects, and another sends those that differ. So a run with hundreds of objects takes as
    many requests as a run with a single object. The module then reads the definitions again and fails if they still differ.
  - Passwords are compared with the salted hashes that the broker stores, so only a changed password counts as a change.
  - Unlisted objects are kept, unless O(purge) is set. The user C(guest) is always deleted.
  - A queue or an exchange that exists with other values cannot be changed. The module then fails before it changes anything.
  - If the broker rejects the administrator's password, C(rabbitmqctl) imports the administrator from O(definitions). The
    Erlang cookie authenticates C(rabbitmqctl).
  - Enables the stable feature flags, which RabbitMQ requires before an upgrade to the next series.
options:
  url:
    description: Scheme, host and port of the management API.
    type: str
    required: true
  ca_file:
    description: File on the host with the certificate authority of an HTTPS URL. The default is the host's trust store.
    type: path
  administrator:
    description: The user who makes the requests.
    type: str
    required: true
  password:
    description: The administrator's password.
    type: str
    required: true
  definitions:
    description: The file on the host that defines the administrator.
    type: path
    required: true
  vhosts:
    description: In the format of the role's C(rabbitmq_vhosts).
    type: list
    elements: dict
    default: []
  users:
    description: In the format of the role's C(rabbitmq_users).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The name.
        type: str
        required: true
      password:
        description: The password.
        type: str
        required: true
      tags:
        description: Tags, such as V(monitoring).
        type: list
        elements: str
        default: []
      limits:
        description: Limits, such as C(max-connections).
        type: dict
        default: {}
      permissions:
        description: Permissions per virtual host.
        type: list
        elements: dict
        default: []
      topic_permissions:
        description: Topic permissions per virtual host and exchange.
        type: list
        elements: dict
        default: []
  policies:
    description: In the format of the role's C(rabbitmq_policies).
    type: list
    elements: dict
    default: []
  operator_policies:
    description: In the format of the role's C(rabbitmq_operator_policies).
    type: list
    elements: dict
    default: []
  parameters:
    description: In the format of the role's C(rabbitmq_parameters).
    type: list
    elements: dict
    default: []
  global_parameters:
    description: In the format of the role's C(rabbitmq_global_parameters).
    type: list
    elements: dict
    default: []
  exchanges:
    description: In the format of the role's C(rabbitmq_exchanges).
    type: list
    elements: dict
    default: []
  queues:
    description: In the format of the role's C(rabbitmq_queues).
    type: list
    elements: dict
    default: []
  bindings:
    description: In the format of the role's C(rabbitmq_bindings).
    type: list
    elements: dict
    default: []
  purge:
    description:
      - Whether to delete unlisted users, permissions and policies, and unlisted virtual hosts that are empty.
      - Exchanges, queues, bindings and parameters are never deleted.
    type: bool
    default: false
  purge_vhosts:
    description: Virtual hosts that O(purge) deletes even if they are not empty.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds to wait for the management API to answer.
    type: int
    default: 60
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: A virtual host, its user and a policy
  django_celery.stack.rabbitmq_definitions:
    url: http://127.0.0.1:15672
    administrator: admin
    password: "{{ vault_administrator_password }}"
    definitions: /etc/rabbitmq/definitions.json
    vhosts:
      - name: shop
        limits: {max-connections: 200}
    users:
      - name: worker
        password: "{{ vault_worker_password }}"
        permissions:
          - {vhost: shop, configure: "^celery", write: ".*", read: ".*"}
    policies:
      - name: bounded
        vhost: shop
        pattern: ".*"
        apply_to: queues
        definition: {max-length: 100000, overflow: reject-publish}

- name: Delete what is not listed
  django_celery.stack.rabbitmq_definitions:
    url: http://127.0.0.1:15672
    administrator: admin
    password: "{{ vault_administrator_password }}"
    definitions: /etc/rabbitmq/definitions.json
    vhosts:
      - name: shop
    purge: true
"""

RETURN = r"""
removed:
  description: Objects that were deleted.
  type: list
  elements: str
  returned: always
  sample: [user guest]
kept:
  description: Unlisted virtual hosts that are kept, each with the reason.
  type: list
  elements: str
  returned: always
  sample: ["vhost old is not listed and stays: it has 2 queues, 5 messages."]
"""


def main() -> None:
    objects = {"type": "list", "elements": "dict", "default": []}
    user = {
        "name": {"type": "str", "required": True},
        "password": {"type": "str", "required": True, "no_log": True},
        "tags": {"type": "list", "elements": "str", "default": []},
        "limits": {"type": "dict", "default": {}},
        "permissions": objects,
        "topic_permissions": objects,
    }
    module = UnloggedModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "ca_file": {"type": "path"},
            "administrator": {"type": "str", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
            "definitions": {"type": "path", "required": True},
            "vhosts": objects,
            "users": {**objects, "options": user},
            "policies": objects,
            "operator_policies": objects,
            "parameters": objects,
            "global_parameters": objects,
            "exchanges": objects,
            "queues": objects,
            "bindings": objects,
            "purge": {"type": "bool", "default": False},
            "purge_vhosts": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    # With -vvv, Ansible prints the module's arguments.
    module.no_log_values.update(uri_passwords([module.params["parameters"], module.params["global_parameters"]]))
    try:
        result = Broker(module.params, module.check_mode, module.no_log_values.update).update()
    except NoAnswer as failure:
        if module.check_mode:
            module.exit_json(changed=True, msg=f"{failure} The definitions were not compared.")
        module.fail_json(msg=str(failure))
    except Failure as failure:
        module.fail_json(msg=masked(str(failure)))
    for sentence in result["kept"]:
        module.warn(f"{sentence} List it in rabbitmq_purge_vhosts to delete it.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
