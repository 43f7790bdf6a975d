"""Gives each variable that contains a secret a value of a wrong type, and requires that no output shows the secret."""

from __future__ import annotations

import json
import re

import pytest
from helpers import MARK, ROOT, common_variables, playbook, wiring

WRONG = f"{MARK}wrong"
URL = f"amqp://user:{WRONG}@localhost"
# Values of a wrong type with a secret in them, as from a wrong indentation, a missing dash or a value in the wrong place.
SHAPES = {"mapping": {"value": WRONG}, "list": [WRONG], "list of mappings": [{"value": WRONG}], "nested": {"a": [{"b": [WRONG]}]}}
ALONE = [
    *wiring()["secret_names"],
    *("rabbitmq_administrator_password", "rabbitmq_erlang_cookie", "rabbitmq_users", "rabbitmq_parameters", "rabbitmq_policies"),
    *("postgresql_users", "postgresql_databases", "app_database_url", "app_email_url", "app_environment", "app_allowed_senders"),
    *(
        "app_worker_broker_url",
        "app_beat_broker_url",
        "django_private_environments",
        "django_environment",
        "django_commands",
        "django_processes",
        "celery_workers",
        "host_package_index_url",
    ),
    *("flower_password", "flower_cookie_secret", "flower_broker_url", "flower_broker_api", "nginx_certificate_key"),
]
# These values have the right type.
VALID = {"app_allowed_senders: list", "django_environment: mapping"}
CASES = {f"{name}: {shape}": {name: value} for name in ALONE for shape, value in SHAPES.items() if f"{name}: {shape}" not in VALID}
# A string instead of a mapping or a list.
MAPPINGS = ("rabbitmq_users", "rabbitmq_parameters", "postgresql_users", "django_environment", "django_commands", "celery_workers")
CASES |= {f"{name}: text": {name: WRONG} for name in MAPPINGS}
# Values of the right type with a secret in a wrong place.
CASES |= {
    "misspelt password": {"rabbitmq_adminstrator_password": WRONG},
    "misspelt role variable": {"flower_passwort": WRONG, "django_enviroment": {"SECRET_KEY": WRONG}},
    "password of a user as a number": {"rabbitmq_users": [{"name": "a", "password": {"text": WRONG}}]},
    "unknown key of a user": {"rabbitmq_users": [{"name": "a", "pass": WRONG}]},
    "unknown key of a database user": {"postgresql_users": [{"name": "a", "pass": WRONG}]},
    "password of a database user as a list": {"postgresql_users": [{"name": "a", "password": [WRONG]}]},
    "user in a parameter's URI": {"rabbitmq_parameters": [{"component": "shovel", "vhost": "x", "name": "s", "value": URL}]},
    "unknown key of a parameter": {"rabbitmq_parameters": [{"component": "shovel", "uri": URL}]},
    "unknown name in the environment": {"app_environment": {"SECRET_KEYS": WRONG}},
    "value of the environment with a line break": {"django_environment": {"EMAIL_URL": f"smtp://u:{WRONG}@h\nX"}},
    "mapping in a private environment": {"django_private_environments": {"worker": {"BROKER_URL": {"password": WRONG}}}},
    "text as a private environment": {"django_private_environments": {"worker": WRONG}},
    "unknown key of the private environments": {"django_private_environments": {"workers": {"BROKER_URL": WRONG}}},
    "mapping in the environment": {"django_environment": {"EMAIL_URL": {"password": WRONG}}},
    "standard input as a mapping": {"django_commands": [{"command": "a", "stdin": {"password": WRONG}}]},
    "unknown key of a command": {"django_commands": [{"command": "a", "input": WRONG}]},
    "environment of a process": {"django_processes": [{"name": "a", "command": ["b"], "environment": {"A": [WRONG]}}]},
    "environment of a worker": {"celery_workers": [{"name": "a", "queues": ["b"], "environment": WRONG}]},
    "mail server of another scheme": {"app_email_url": f"http://u:{WRONG}@h"},
    "mail server with a bracket": {"app_email_url": f"smtp://u:{WRONG}@[h"},
    "broker of another scheme": {"flower_broker_url": f"redis://:{WRONG}@h"},
    "certificate key that is no key": {"nginx_certificate": "x", "nginx_certificate_key": WRONG},
    "template with an error": {"flower_password": "{{ ('" + WRONG + "' | no_such_filter) }}"},
    "template that is not closed": {"flower_password": "{{ '" + WRONG + "'"},
    "template that divides": {"flower_password": "{{ '" + WRONG + "' / 2 }}"},
}
GROUPS = ("broker", "app", "web", "workers", "flower", "database", "proxy")


def host_name(case):
    return re.sub(r"[^a-z0-9]+", "-", case.lower()).strip("-") + ".invalid"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two outputs of one run with a host per case: as the default callback prints it, and in JSON."""
    folder = tmp_path_factory.mktemp("types")
    common_variables(folder)
    hosts = {
        host_name(case): {"wiring_brokers": ["{{ inventory_hostname }}"], "wiring_broker_clients": [], **variables}
        for case, variables in CASES.items()
    }
    for variables in hosts.values():
        variables |= {"wiring_database": "{{ inventory_hostname }}", "wiring_database_clients": [], "django_migrate": True}
        variables |= {"celery_beat": True, "wiring_other_web_hosts": [], "wiring_proxies": [], "ca_certificates_files": []}
    children = {name: {"hosts": dict.fromkeys(hosts)} for name in GROUPS}
    source = {"wiring_repository": str(ROOT), "service_address": "{{ inventory_hostname }}"}
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": source, "children": children}}))
    return playbook("-vvv", "-i", folder, "playbooks/validate.yml", ANSIBLE_STRATEGY="free", ANSIBLE_FORKS="4")


# The run with a host per case takes several minutes.
pytestmark = pytest.mark.slow


@pytest.mark.attack(kind="variables: secret of a wrong type")
@pytest.mark.parametrize("case", CASES)
def test_wrong_value_is_refused_without_showing_the_secret(outputs, case):
    _, answer, _ = outputs
    results = [
        task["hosts"][host_name(case)] for play in answer["plays"] for task in play["tasks"] if host_name(case) in task["hosts"]
    ]
    failed = [result for result in results if result.get("failed")]
    assert failed, "the value was accepted"
    assert MARK not in json.dumps(results)
    name = next(iter(CASES[case]))
    assert name in json.dumps([result["msg"] for result in failed])


def test_nothing_is_printed_outside_the_results(outputs):
    assert MARK not in outputs[2]
