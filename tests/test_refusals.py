"""Tests that wrong variables are refused before Ansible contacts a host. The message contains the variable, its value and the
allowed values.

One run of playbooks/validate.yml tests all cases, on hosts whose names do not resolve: a task that tried to connect would make the
host unreachable. With the strategy `free`, each host fails with its own error. With the playbook's strategy, the first error stops
the run for all hosts; the last tests check this with site.yml.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from helpers import MARK, ROOT, common_variables, names_in, playbook

LAYERS = {
    "backups": "broker",
    "rabbitmq": "broker",
    "erlang": "broker",
    "postgresql": "database",
    "django": "app",
    "celery": "workers",
    "flower": "flower",
    "nginx": "proxy",
    "valkey": "cache",
}

USER = {"name": "worker", "password": f"{MARK}worker"}
NODES = [{"name": f"mq{number}"} for number in (1, 2, 3)]
CLUSTER = {"rabbitmq_nodes": NODES, "rabbitmq_node_name": "mq1", "rabbitmq_distribution_address": "192.0.2.1"}
WORKER = {"name": "mail", "queues": ["mail.v1"]}
PROCESS = {"name": "relay", "command": ["python", "manage.py", "relay"]}
DATABASE_USER = {"name": "orders", "password": f"{MARK}orders"}
PRIMARY = {"postgresql_standbys": [{"name": "db2", "address": "192.0.2.2"}]}
NO_DATABASES = {"postgresql_databases": [], "postgresql_clients": []}
SCRAPES = (("one", "web1"), ("two", "1:2:3"), ("three", "web1:8000"), ("four", "[::1]:8000"))
TOPIC = {"vhost": "of-topics", "exchange": "e", "write": "", "read": ""}
ACME = {"nginx_acme_directory_url": "https://acme.example/directory"}
POLICY = {"name": "p", "vhost": "mailroom", "pattern": "^p", "definition": {}}

KNOWN = "combinations, from each version on: RabbitMQ 4.3.3 on Erlang 27 or 28 or 29, RabbitMQ 4.3.0 on Erlang 26.2 or 27 or 28,"
NO_VHOST = (
    "rabbitmq_users, policies, parameters, exchanges, queues or bindings name the virtual host {}, which rabbitmq_vhosts does "
    "not list."
)
LATE = "celery_workers has a soft_time_limit that is not less than the time_limit, for mail."


def versions(rabbitmq, erlang):
    # The distribution ships only one version.
    return {"rabbitmq_version": rabbitmq, "rabbitmq_erlang_version": erlang, "rabbitmq_source": "team_rabbitmq"}


# The cases by host group: the variables of each case, and its error message. The group's name starts with the role's name.
REFUSED = {
    # Choices and keys in the argument specs.
    "rabbitmq specs": [
        (
            {"rabbitmq_source": "snap"},
            "rabbitmq_source is 'snap'; allowed: automatic, distribution, team_rabbitmq, folder.",
        ),
        (
            {"rabbitmq_policies": [{**POLICY, "apply_to": "queue"}]},
            "rabbitmq_policies[0].apply_to is 'queue'; allowed: all, queues, classic_queues, quorum_queues, streams, exchanges.",
        ),
        (
            {"rabbitmq_users": [{**USER, "tag": []}]},
            "rabbitmq_users[0] has tag; allowed: limits, name, password, permissions, tags, topic_permissions.",
        ),
        (
            {"rabbitmq_exchanges": [{"name": "orders", "type": "topic"}]},
            "rabbitmq_exchanges[0] has no vhost, which is required.",
        ),
    ],
    "rabbitmq secrets": [({"secret_rabbitmq_erlang_cookie": "{{ not_generated }}"}, "'not_generated' is undefined")],
    "celery specs": [
        (
            {"celery_workers": [{**WORKER, "pool": "fork"}]},
            "celery_workers[0].pool is 'fork'; allowed: prefork, threads, solo.",
        ),
    ],
    "rabbitmq administrator": [
        ({"rabbitmq_administrator": "guest"}, "rabbitmq_administrator must not be guest: the role deletes that user."),
    ],
    # Errors from layer_variable_errors, which runs before any expression uses the variables.
    "rabbitmq types": [
        ({"rabbitmq_open_files": "many"}, "rabbitmq_open_files is 'many', not a whole number."),
        ({"rabbitmq_memory_high_watermark": "0.5"}, "rabbitmq_memory_high_watermark is '0.5', not a number."),
        ({"rabbitmq_listeners": "127.0.0.1:5672"}, "rabbitmq_listeners is '127.0.0.1:5672', not a list."),
        ({"rabbitmq_repository_urls": "https://a.example"}, "rabbitmq_repository_urls is 'https://a.example', not a list."),
        ({"rabbitmq_version": 4.10}, "rabbitmq_version is 4.1, not a quoted string."),
        ({"rabbitmq_listener": []}, "rabbitmq_listener is not a variable of the role rabbitmq, did you mean rabbitmq_listeners?"),
        ({"rabbitmq_administrator_password": 123456789012}, "rabbitmq_administrator_password is not a quoted string."),
    ],
    "erlang types": [
        ({"erlang_versoin": "27"}, "erlang_versoin is not a variable of the role erlang, did you mean erlang_version?")
    ],
    "django types": [
        ({"django_migrate": "false"}, "django_migrate is 'false', not true or false."),
        ({"django_proceses": []}, "django_proceses is not a variable of the role django, did you mean django_processes?"),
    ],
    "celery limits": [
        ({"celery_workers": [{**WORKER, "time_limit": "120"}]}, "celery_workers[0].time_limit is '120', not a whole number.")
    ],
    "celery types": [({"celery_worker": []}, "celery_worker is not a variable of the role celery, did you mean celery_workers?")],
    "flower types": [
        ({"flower_port": "5555"}, "flower_port is '5555', not a whole number."),
        ({"flower_prot": 5555}, "flower_prot is not a variable of the role flower, did you mean flower_port?"),
    ],
    "offline_packages": [
        (
            {"offline_packages_archive": "/nowhere.tar"},
            "offline_packages_archive is '/nowhere.tar', which is not a file on the controller. `make offline-packages` writes it.",
        ),
    ],
    "ca_certificates": [
        ({"ca_certificates_files": ["/nowhere.crt"]}, "/nowhere.crt in ca_certificates_files is not a file on the controller."),
    ],
    "ca_certificates names": [
        (
            {"ca_certificates_file": []},
            "ca_certificates_file is not a variable of the role ca_certificates, did you mean ca_certificates_files?",
        ),
    ],
    "certificates": [
        ({"certificates_day": 9}, "certificates_day is not a variable of the role certificates, did you mean certificates_days?"),
    ],
    "certificates rules": [
        (
            {"certificates_renewal_days": 400},
            "certificates_renewal_days is 400 and certificates_days is 397; allowed: 1 to 36500, and certificates_renewal_days",
        ),
        (
            {"certificates_authority": "/nowhere.pem"},
            "/nowhere.pem is not a certificate; allowed: a string in PEM format, or the path of such a file on the controller.",
        ),
        (
            {"certificates_authority_key": MARK},
            "certificates_authority_key or the key of a service is not a private key; allowed: a string in PEM format, or the path",
        ),
        (
            {"certificates_services": [{"name": "cache", "directory": "/etc/ssl/cache", "group": "redis", "names": []}]},
            "The certificate of cache has no names; allowed: names and IP addresses.",
        ),
    ],
    "firewall": [
        ({"firewall_enable": True}, "firewall_enable is not a variable of the role firewall, did you mean firewall_enabled?"),
    ],
    "firewall rules": [
        (
            {"firewall_name": "a-name-of-18-chars"},
            "firewall_name is 'a-name-of-18-chars'; allowed: a lower-case word of at most 17 letters, digits and hyphens.",
        ),
        ({"firewall_rules": [{"ports": [5672, 70000]}]}, "firewall_rules has the ports 5672, 70000; allowed: 1 to 65535."),
        (
            {"firewall_rules": [{"ports": [5672], "sources": ["192.0.2.7", "192.0.2.0/33", "web1"]}]},
            "firewall_rules has the sources 192.0.2.0/33; allowed: addresses, networks and host names.",
        ),
    ],
    "rabbitmq certificate": [
        ({"rabbitmq_certificate": "/nowhere.pem"}, "The certificate of rabbitmq has no key; a certificate needs its key."),
    ],
    "rabbitmq authority": [
        (
            {"certificates_authority_key": "", "rabbitmq_certificate_key": ""},
            "certificates_authority_key is empty, and rabbitmq has no certificate; allowed: the key of certificates_authority.",
        ),
    ],
    "postgresql certificate": [
        ({"postgresql_certificate": "/nowhere.pem"}, "The certificate of postgresql has no key; a certificate needs its key."),
    ],
    "postgresql authority": [
        (
            {"certificates_authority": "", "postgresql_certificate_key": ""},
            "certificates_authority is empty, and postgresql needs a certificate; allowed: the certificate of a CA.",
        ),
    ],
    "valkey certificate": [
        ({"valkey_certificate": "/nowhere.pem"}, "The certificate of valkey has no key; a certificate needs its key."),
    ],
    "valkey authority": [
        (
            {"certificates_authority": "", "valkey_certificate_key": ""},
            "certificates_authority is empty, and valkey needs a certificate; allowed: the certificate of a CA.",
        ),
    ],
    "valkey types": [
        ({"valkey_port": "6379"}, "valkey_port is '6379', not a whole number."),
        ({"valkey_eviction": "lru"}, "valkey_eviction is 'lru'; allowed: noeviction, allkeys-lru,"),
        ({"valkey_maxmemory": "1gb"}, "valkey_maxmemory is not a variable of the role valkey, did you mean valkey_max_memory?"),
    ],
    "valkey": [
        ({"valkey_password": f"{MARK[:5]}"}, "valkey_password has fewer than 12 characters; allowed: 12 or more."),
        (
            {"valkey_addresses": ["*", "192.0.2.1", "::1", "cache.example"]},
            "valkey_addresses is *, 192.0.2.1, ::1, cache.example; allowed: *, IPv4 addresses and IPv6 addresses.",
        ),
        ({"valkey_port": 0}, "valkey_port is 0; allowed: 1 to 65535."),
        ({"valkey_max_memory": "2 GB"}, "valkey_max_memory is '2 GB'; allowed: sizes such as 256mb and 2gb."),
    ],
    # The roles' rules.
    "rabbitmq": [
        (versions("4", "27"), "rabbitmq_version is '4'; allowed: a series or a version, such as 4.0 or 4.2.10."),
        *(
            (
                versions(*pair),
                f"rabbitmq_version {pair[0]} does not run on Erlang {pair[1]} (rabbitmq_erlang_version); known {KNOWN}",
            )
            for pair in (("3.13", "27"), ("4.0", "28"), ("4.0", "29"), ("4.2", "29"))
        ),
        ({"rabbitmq_erlang_cookie": MARK[:19]}, "rabbitmq_erlang_cookie must be 20 to 255 letters and digits."),
        ({"rabbitmq_administrator_password": MARK[:11]}, "rabbitmq_administrator_password must have at least 12 characters."),
        (
            {"rabbitmq_nodes": NODES[:2]},
            "rabbitmq_nodes lists mq1, mq2; allowed: no node, three, or a larger odd number. With two nodes, the loss of either "
            "stops the broker, and a fourth node does not let the cluster lose more nodes than three do.",
        ),
        (
            CLUSTER | {"rabbitmq_nodes": [*NODES[:2], {"name": "mq 3"}]},
            "rabbitmq_nodes lists mq1, mq2, mq 3; a name may have letters, digits, dots, hyphens and underscores.",
        ),
        (
            CLUSTER | {"rabbitmq_nodes": [*NODES[:2], {"name": "mq1"}]},
            "rabbitmq_nodes lists mq1, mq2, mq1; each name must be unique.",
        ),
        (
            CLUSTER | {"rabbitmq_nodes": [*NODES[:2], {"name": "mq3", "address": "mq3.example"}]},
            "rabbitmq_nodes has the address mq3.example; allowed: an IPv4 address, or none.",
        ),
        (
            CLUSTER | {"rabbitmq_node_name": "mq4"},
            "rabbitmq_node_name is 'mq4'; allowed: one of rabbitmq_nodes, mq1, mq2, mq3.",
        ),
        (
            CLUSTER | {"rabbitmq_distribution_address": "127.0.0.1"},
            "rabbitmq_distribution_address is 127.0.0.1, where other nodes can't reach this node; allowed: an address of the "
            "host, or 0.0.0.0.",
        ),
        ({"rabbitmq_stop_wait": -1}, "rabbitmq_stop_wait is -1; allowed: 0 to 86400 seconds."),
        ({"rabbitmq_plugins": []}, "rabbitmq_plugins must list rabbitmq_management: the role uses its API."),
        *(
            (
                {"rabbitmq_memory_max": limit},
                f"rabbitmq_memory_max is '{limit}'; allowed: a size such as 2G, or a share of the host's memory such as 50%.",
            )
            for limit in ("2 GB", "0", "101%", "infinity", "0.8")
        ),
        (
            {"rabbitmq_allowed_addresses": ["192.0.2.1", "mq1"]},
            "rabbitmq_allowed_addresses has mq1; allowed: addresses and networks, such as 192.0.2.1 and 192.0.2.0/24.",
        ),
        ({"rabbitmq_memory_high_watermark": 2}, "rabbitmq_memory_high_watermark is 2; allowed: 0.1 to 0.9."),
        (
            {"rabbitmq_disk_free_limit": "2 gigs"},
            "rabbitmq_disk_free_limit is '2 gigs'; allowed: a number with its unit, such as 2GB, or a multiple of the memory, "
            "such as 0.6.",
        ),
        (
            {"rabbitmq_listeners": ["127.0.0.1"]},
            "rabbitmq_listeners, rabbitmq_management_listener and rabbitmq_prometheus_listener take an address with a port, such "
            "as 127.0.0.1:5672, not 127.0.0.1.",
        ),
        (
            {"rabbitmq_users": [{**USER, "name": "guest"}]},
            "rabbitmq_users must not list guest or admin (rabbitmq_administrator).",
        ),
        ({"rabbitmq_users": [{**USER, "permissions": [{"vhost": "of-users"}]}]}, NO_VHOST.format("of-users")),
        ({"rabbitmq_users": [{**USER, "topic_permissions": [TOPIC]}]}, NO_VHOST.format("of-topics")),
        ({"rabbitmq_policies": [{**POLICY, "vhost": "of-policies"}]}, NO_VHOST.format("of-policies")),
        ({"rabbitmq_operator_policies": [{**POLICY, "vhost": "of-operators"}]}, NO_VHOST.format("of-operators")),
        (
            {"rabbitmq_parameters": [{"component": "shovel", "vhost": "of-parameters", "name": "p", "value": {}}]},
            NO_VHOST.format("of-parameters"),
        ),
        ({"rabbitmq_exchanges": [{"name": "e", "vhost": "of-exchanges"}]}, NO_VHOST.format("of-exchanges")),
        ({"rabbitmq_queues": [{"name": "q", "vhost": "of-queues"}]}, NO_VHOST.format("of-queues")),
        (
            {"rabbitmq_bindings": [{"source": "e", "destination": "q", "destination_type": "queue", "vhost": "of-bindings"}]},
            NO_VHOST.format("of-bindings"),
        ),
        (
            {"rabbitmq_parameters": [{"component": "operator_policy", "vhost": "mailroom", "name": "p", "value": {}}]},
            "rabbitmq_parameters must not list operator_policy: use the limits of rabbitmq_vhosts, or rabbitmq_operator_policies.",
        ),
        (
            {"rabbitmq_distribution_address": "localhost"},
            "rabbitmq_distribution_address is 'localhost'; allowed: an IPv4 address, such as 127.0.0.1.",
        ),
        ({"rabbitmq_purge_vhosts": ["old"]}, "rabbitmq_purge_vhosts lists old, but rabbitmq_purge is false; allowed: true."),
        (
            {"rabbitmq_purge": True, "rabbitmq_purge_vhosts": ["mailroom"]},
            "rabbitmq_purge_vhosts lists mailroom, which rabbitmq_vhosts also lists.",
        ),
    ],
    "postgresql": [
        (
            {"postgresql_allowed_addresses": ["192.0.2.1", "db2"]},
            "postgresql_allowed_addresses has db2; allowed: addresses and networks, such as 192.0.2.1 and 192.0.2.0/24.",
        ),
        ({"postgresql_port": 0}, "postgresql_port is 0; allowed: 1 to 65535."),
        ({"postgresql_memory": 95}, "postgresql_memory is 95; allowed: 0.1 to 0.9."),
        ({"postgresql_max_connections": 5}, "postgresql_max_connections is 5; allowed: 10 or more."),
        (
            {"postgresql_users": [{**DATABASE_USER, "name": "Mail Room"}], **NO_DATABASES},
            "postgresql_users has the names Mail Room; allowed: lower-case letters, digits, hyphens and underscores.",
        ),
        (
            {"postgresql_users": [{**DATABASE_USER, "name": "postgres"}], **NO_DATABASES},
            "postgresql_users must not list postgres, the server's superuser.",
        ),
        (
            {"postgresql_users": [{**DATABASE_USER, "name": "replication"}], **NO_DATABASES, **PRIMARY},
            "postgresql_users must not list replication, the user of the standbys.",
        ),
        (
            {**PRIMARY, "postgresql_replication_password": MARK[:11]},
            "postgresql_replication_password is too short or has other characters; allowed with postgresql_primary or "
            "postgresql_standbys: 12 or more letters, digits, underscores, dots, tildes and hyphens.",
        ),
        (
            {**PRIMARY, "postgresql_primary": "192.0.2.1"},
            "postgresql_primary is 192.0.2.1, and postgresql_standbys has db2; allowed: one of them, since a "
            "standby has no standbys.",
        ),
        (
            {"postgresql_primary": "192.0.2.1", "postgresql_primary_ca_file": ""},
            "postgresql_primary_ca_file is empty; with postgresql_primary and postgresql_tls, it must be the path of a file on "
            "the host with the certificate authority of the primary.",
        ),
        (
            {"postgresql_archive_repository": "archive"},
            "postgresql_archive_repository is 'archive'; allowed: an absolute path of letters, digits,",
        ),
        (
            {"postgresql_archive_repository": "/srv/archive", "postgresql_archive_password": MARK[:11]},
            "postgresql_archive_password is too short or has other characters; allowed with postgresql_archive_repository:",
        ),
        (
            {"postgresql_archive_options": {"repo1-s3-key": f"{MARK}\nrepo1-path=/tmp"}},
            "postgresql_archive_options has the names repo1-s3-key; allowed: names of pgBackRest's options, such as repo1-type, "
            "with values of one line.",
        ),
        (
            {"postgresql_archive_options": {"repo1-path": "/srv/archive"}},
            "postgresql_archive_options has repo1-path, which the role sets; allowed: other options.",
        ),
        ({"postgresql_archive_days": 0}, "postgresql_archive_days is 0; allowed: 1 or more."),
        ({"postgresql_base_backup_time": "24:00"}, "postgresql_base_backup_time is '24:00'; allowed: a time such as 03:30."),
        (
            {"postgresql_restore_time": "2026-11-28 10:00:00"},
            "postgresql_restore_time is '2026-11-28 10:00:00'; allowed: a time with its offset from UTC, such as",
        ),
        (
            {"postgresql_users": [{**DATABASE_USER, "password": MARK[:11]}], **NO_DATABASES},
            "postgresql_users has a password of fewer than 12 characters for orders.",
        ),
        (
            {"postgresql_users": [{**DATABASE_USER, "role": "stranger"}], **NO_DATABASES},
            "postgresql_users has the role stranger; allowed: the names of users in postgresql_users.",
        ),
        (
            {"postgresql_users": [DATABASE_USER], "postgresql_clients": []},
            "postgresql_databases or postgresql_clients name the user mailroom, which postgresql_users does not list.",
        ),
        (
            {"postgresql_clients": [{"database": "mailroom", "user": "stranger", "address": "::1"}]},
            "postgresql_databases or postgresql_clients name the user stranger, which postgresql_users does not list.",
        ),
        (
            {"postgresql_databases": [], "postgresql_clients": [{"database": "mailroom", "user": "mailroom", "address": "::1"}]},
            "postgresql_clients name the database mailroom, which postgresql_databases does not list.",
        ),
    ],
    "rabbitmq platform": [
        (
            {"host_platform": "el8"},
            "host_platform is 'el8'; wiring_versions knows debian13, ubuntu2404, el9, el10, macos. Elsewhere set rabbitmq_version "
            "and erlang_version, or add it there. EL 8 is refused: its dnf works only with Python 3.6, which Ansible no longer "
            "supports.",
        ),
    ],
    # inventories/common.
    "rabbitmq distribution": [
        (
            {"rabbitmq_version": "4.2"},
            "rabbitmq_version is 4.2, and debian13 (host_platform) has RabbitMQ 4.0: set rabbitmq_source to team_rabbitmq for "
            "another version, or set host_platform to the host's platform.",
        ),
        (
            {"rabbitmq_version": "4.0.12", "rabbitmq_source": "distribution", "erlang_version": "26"},
            "erlang_version is 26, and debian13 (host_platform) has Erlang 27: use that version, or set host_platform to "
            "the host's platform.",
        ),
    ],
    "common names": [
        ({"app_nmae": "x"}, "app_nmae is not a variable of inventories/common; did you mean app_name?"),
        ({"service_adress": "x"}, "service_adress is not a variable of inventories/common; did you mean service_address?"),
        ({"wiring_brokr": "x"}, "wiring_brokr is not a variable of inventories/common; did you mean wiring_brokers?"),
        ({"host_platfrom": "el9"}, "host_platfrom is not a variable of inventories/common; did you mean host_platform?"),
        ({"backup_directroy": "/b"}, "backup_directroy is not a variable of inventories/common; did you mean backup_directory?"),
        (
            {"app_zzzzzzzz": 1},
            "app_zzzzzzzz is not a variable of inventories/common. Declare your own variables in "
            "inventories/common/application.yml.",
        ),
    ],
    "common types": [
        ({"app_task_time_limit": "120"}, "app_task_time_limit is '120', not a whole number."),
        ({"app_allowed_senders": "@example.org"}, "app_allowed_senders is '@example.org', not a list."),
        ({"app_firewall_rules": [443]}, "app_firewall_rules[0] is not a mapping."),
        ({"wiring_one_host": "false"}, "wiring_one_host is 'false', not true or false."),
        ({"service_address": 10}, "service_address is 10, not a quoted string."),
        ({"app_database_url": ["a"]}, "app_database_url is not a quoted string."),
        ({"app_environment": ["DEBUG=true"]}, "app_environment is not a mapping."),
    ],
    "common secrets": [
        ({"secret_django_key": [f"{MARK}one"]}, "secret_django_key is not a quoted string."),
        ({"secret_app_api_key": 1234567890123456}, "secret_app_api_key is not a quoted string."),
        ({"secret_app_metrics_token": None}, "secret_app_metrics_token is empty, not a quoted string."),
        ({"secret_smtp_password": 123456}, "secret_smtp_password is not a quoted string."),
        ({"secret_flower_cookie": "{{ not_generated }}"}, "secret_flower_cookie can't be evaluated: 'not_generated' is undefined"),
    ],
    "common equal secrets": [
        (
            {"secret_django_key": f"{MARK}same", "secret_app_api_key": "{{ secret_django_key }}"},
            "secret_app_api_key and secret_django_key are the same; each secret must be different.",
        ),
        (
            {"secret_app_api_key": f"{MARK}same", "app_environment": {"SECRET_KEY": "{{ secret_app_api_key }}"}},
            "SECRET_KEY of app_environment and secret_app_api_key are the same; each secret must be different.",
        ),
    ],
    "common environment": [
        (
            {"app_environment": {"DEFAULT_FROM_EMAI": "a@example.org"}},
            "app_environment has DEFAULT_FROM_EMAI, which the application does not read; did you mean DEFAULT_FROM_EMAIL?",
        ),
        (
            {"app_environment": {"ZZZZ": ""}},
            "app_environment has ZZZZ, which the application does not read; app_environment_names lists the names that it reads.",
        ),
    ],
    "common email": [
        (
            {"app_email_url": f"smtp://u:{MARK}@mail.example.org:smtp"},
            "app_email_url has a malformed port or host; allowed: a URL such as smtp://host:port, with the scheme "
            "smtp, smtp+tls, smtp+ssl or consolemail. Special characters in a password must be URL-encoded (urlencode).",
        ),
    ],
    "rabbitmq sources": [
        (
            {"rabbitmq_folder": "/nowhere", "rabbitmq_source": "folder"},
            "rabbitmq_folder is '/nowhere'; allowed: a folder on the controller with RPMs.",
        ),
        (
            {"rabbitmq_repository_keys": [{"key": "k.asc", "fingerprint": "9F4587F226208342"}]},
            "rabbitmq_repository_keys has the fingerprint 9F4587F226208342; allowed: 40 hexadecimal digits, as the key's owner "
            "publishes them. A key ID is too short to tell keys apart.",
        ),
    ],
    "erlang": [
        ({"erlang_source": "folder"}, "erlang_folder is ''; allowed: a folder on the controller with RPMs."),
        (
            {"erlang_repository_keys": [{"key": "k.asc", "fingerprint": "6B73A36E6026DFCA"}]},
            "erlang_repository_keys has the fingerprint 6B73A36E6026DFCA; allowed: 40 hexadecimal digits,",
        ),
        ({"erlang_version": "OTP-27"}, "erlang_version is 'OTP-27'; allowed: a version or its beginning, such as 27 or 27.3."),
    ],
    "django": [
        (
            {"host_prefix": "~/.local"},
            "host_prefix is '~/.local'; allowed: an absolute path without spaces or a trailing slash, or an empty string.",
        ),
        (
            {"django_name": "Mail Room"},
            "django_name is 'Mail Room'; allowed: a lower-case word of at most 24 letters, digits and hyphens.",
        ),
        ({"django_source": "/nowhere"}, "django_source is '/nowhere'; allowed: a folder on the controller."),
        (
            {"django_source": "{{ project_without_manage }}"},
            "django_manage is 'manage.py'; allowed: a script that ends with .py in",
        ),
        ({"django_manage": "-m django"}, "django_manage is '-m django'; allowed: a script that ends with .py in"),
        (
            {"django_subdirectory": "../src"},
            "django_subdirectory is '../src'; allowed: the path of a directory in django_source, such as src, or an empty ",
        ),
        ({"django_wsgi": ""}, "django_wsgi is '' and django_asgi is ''; allowed: exactly one of them,"),
        (
            {"django_asgi": "mailroom.asgi:application"},
            "django_wsgi is 'mailroom.wsgi:application' and django_asgi is 'mailroom.asgi:application'; allowed: exactly one",
        ),
        (
            {"django_wsgi": "", "django_asgi": "mailroom.asgi:application", "django_web": True},
            "django_requirements is 'requirements.txt', which lacks uvicorn-worker. Add these packages to the project, and lock",
        ),
        (
            {"django_source_packages": ["psycopg-c"]},
            "django_requirements is 'requirements.txt', which lacks psycopg-c. Add these packages to the project, and lock again.",
        ),
        (
            {"django_data_directories": ["media", "../logs", "/srv"]},
            "django_data_directories has ../logs, /srv; allowed: paths relative to the application's directory in "
            "/var/lib, such as media.",
        ),
        (
            {"django_environment": {"JSON": {"a": 1}, "KEY": f"{MARK}\n{MARK}"}},
            "django_environment, django_build_environment or django_private_environments is wrong: JSON is a mapping or a nested "
            "list. For JSON, use to_json. The value of the environment variable KEY contains a line break or a NUL byte.",
        ),
        ({"django_build_commands": [{"command": []}]}, "django_build_commands has an empty command; allowed: a program with"),
        (
            {"django_source": "{{ project_without_hashes }}"},
            "django_requirements is 'requirements.txt', which has no hash for celery==5.7.0. `uv export --output-file "
            "requirements.txt` writes hashes, and `uv pip compile` and `pip-compile` write them with --generate-hashes.",
        ),
        (
            {"django_requirements": "no-lock.txt"},
            "django_requirements is 'no-lock.txt'; allowed: a lock file with hashes in django_source (uv.lock, pylock.toml,",
        ),
        (
            {"django_wsgi": "mailroom.wsgi"},
            "django_wsgi is 'mailroom.wsgi'; allowed: a module and its application, such as mailroom.wsgi:application.",
        ),
        (
            {"django_processes": [{**PROCESS, "name": "web"}]},
            "django_processes and django_timers have the names web; web, web-standby, worker, beat and flower are reserved for "
            "other services.",
        ),
        (
            {"django_processes": [PROCESS], "django_timers": [{**PROCESS, "schedule": "daily"}]},
            "django_processes and django_timers have the names relay, relay; each name must be unique.",
        ),
        (
            {"django_processes": [{**PROCESS, "cpu_weight": 0}]},
            "django_processes or django_timers has a wrong limit for relay; allowed: a memory_max such as 512M or 50%,",
        ),
        (
            {"django_processes": [{**PROCESS, "watchdog": 60}]},
            "django_processes has a watchdog for relay; a watchdog requires readiness notify.",
        ),
        ({"django_releases_kept": 1}, "django_releases_kept is 1; allowed: 2 or more."),
        (
            {"django_public_directories": ["static", "../other"]},
            "django_public_directories is static, ../other; allowed: names of directories in django_source, not paths.",
        ),
        (
            {"django_web_proxies": ["proxy1", "192.0.2.0/33"]},
            "django_web_proxies has 192.0.2.0/33; allowed: addresses, networks and host names.",
        ),
    ],
    "celery": [
        (
            {"celery_requirements": "/nowhere"},
            "celery_requirements is '/nowhere'; allowed: a lock file on the controller that pins Celery.",
        ),
        (
            {"celery_requirements": "{{ lock_5_5 }}"},
            "has no setting for its control queues, which the broker denies (RabbitMQ 4.0). Celery 5.7 works. For an older "
            "version, list transient_nonexcl_queues in rabbitmq_permitted_deprecated_features.",
        ),
        ({"celery_workers": [WORKER, WORKER]}, "celery_workers has the names mail, mail; each name must be unique."),
        (
            {"celery_workers": [{**WORKER, "name": "Mail@x"}]},
            "celery_workers has the names Mail@x; allowed: lower-case letters, digits, hyphens and underscores.",
        ),
        *(
            (
                {"celery_workers": [{**WORKER, **limit}]},
                "celery_workers has a wrong limit for mail; allowed: a memory_max such as",
            )
            for limit in ({"memory_max": "80 %"}, {"memory_max": "101%"}, {"tasks_max": 0}, {"cpu_weight": 10001})
        ),
        ({"celery_workers": [{**WORKER, "queues": []}]}, "celery_workers has no queues for mail; allowed: one or more."),
        ({"celery_workers": [{**WORKER, "time_limit": 60, "soft_time_limit": 90}]}, LATE),
        # 300 is the default time_limit.
        ({"celery_workers": [{**WORKER, "soft_time_limit": 300}]}, LATE),
        (
            {"celery_workers": [{**WORKER, "watchdog": 60}]},
            "celery_workers has a watchdog for mail; a watchdog requires readiness notify.",
        ),
    ],
    "flower": [
        ({"flower_name": "x" * 30}, f"flower_name is '{'x' * 30}'; allowed: a lower-case word of at most 24 letters,"),
        ({"flower_port": 70000}, "flower_port is 70000; allowed: 1 to 65535."),
        ({"flower_password": MARK[:11]}, "flower_password must have at least 12 characters."),
        ({"flower_cookie_secret": MARK}, "flower_cookie_secret must have at least 32 characters."),
        ({"flower_broker_url": f"redis://:{MARK}@localhost"}, "flower_broker_url must begin with amqp:// or amqps://."),
        ({"flower_username": "a:b"}, "flower_username is 'a:b'; allowed: a name without a colon."),
    ],
}
REFUSED |= {
    "nginx types": [
        ({"nginx_hsts_max_age": "60"}, "nginx_hsts_max_age is '60', not a whole number."),
        ({"nginx_upstream": []}, "nginx_upstream is not a variable of the role nginx, did you mean nginx_upstreams?"),
    ],
    "nginx": [
        (
            {"nginx_login_paths": ["/login/", "sign in"]},
            "nginx_login_paths has sign in; allowed: paths that begin with /, such as /login/.",
        ),
        (
            {"nginx_name": "My Shop"},
            "nginx_name is 'My Shop'; allowed: a lower-case word of at most 24 letters, digits and hyphens.",
        ),
        (
            {"nginx_upstreams": []},
            "nginx_upstreams is empty; allowed: one or more addresses with ports, or paths of Unix sockets.",
        ),
        (
            {"nginx_upstreams": ["http://web1:8000", "web2", "/run/web.sock", "[::1]:8000", "127.0.0.1:8000"]},
            "nginx_upstreams or nginx_locations has the upstreams http://web1:8000, web2; allowed: addresses with ports, such "
            "as 127.0.0.1:8000, and paths of Unix sockets.",
        ),
        (
            {"nginx_control_directory": "run/shop; drained"},
            "nginx_control_directory is 'run/shop; drained'; allowed: an absolute path of letters, digits and . _ - / or an "
            "empty string.",
        ),
        (
            {"nginx_server_names": ["a.example.org", ".example.org", "*.example.org", "a; b"]},
            "nginx_server_names has *.example.org, a; b; allowed: host names, addresses, and domains such as .example.org.",
        ),
        (
            {"nginx_listen_addresses": ["eth0", "*"]},
            "nginx_listen_addresses is eth0, *; allowed: *, IPv4 addresses, and IPv6 addresses in brackets.",
        ),
        ({"nginx_certificate": "/c.pem"}, "nginx_certificate and nginx_certificate_key must both be set, or both be empty."),
        (
            {"nginx_certificate": "-----BEGIN CERTIFICATE-----", "nginx_certificate_key": f"/{MARK}"},
            "nginx_certificate and nginx_certificate_key must both be strings in PEM format, or both be absolute paths on the "
            "host.",
        ),
        (
            {"nginx_closed_paths": ["metrics", "/"], "nginx_static_directories": []},
            "nginx_closed_paths, nginx_rate_limits, nginx_locations or nginx_static_directories has the paths metrics, /; "
            "allowed: paths that begin with / and are longer than that.",
        ),
        (
            {"nginx_locations": [{"path": "/flower", "upstreams": ["127.0.0.1:5555"]}]},
            "nginx_locations or nginx_static_directories has the paths /flower; allowed: paths that end with /.",
        ),
        (
            {"nginx_closed_paths": ["/a", "/b", "/a"], "nginx_rate_limits": []},
            "nginx_closed_paths, nginx_rate_limits, nginx_locations and nginx_static_directories have the paths /a, /b, /a; each "
            "path must be unique.",
        ),
        (
            {"nginx_static_directories": [{"path": "/static/", "directory": "/srv/my files"}]},
            "nginx_static_directories has the directories /srv/my files; allowed: absolute paths without spaces, quotes and "
            "braces.",
        ),
        (
            {"nginx_rate_limits": [{"path": "/a", "rate": "10/m"}, {"path": "/b", "rate": "5r/s"}]},
            "nginx_rate_limits has the rates 10/m; allowed: requests per second or minute, such as 5r/s or 10r/m.",
        ),
        (
            {"nginx_client_max_body_size": "20 MB"},
            "nginx_client_max_body_size or a zone_size of nginx_rate_limits is one of 20 MB; allowed: sizes such as 20m.",
        ),
        (
            {"nginx_client_header_timeout": 0},
            "nginx_client_header_timeout, nginx_client_body_timeout and nginx_proxy_read_timeout are 0, 30, 60; allowed: 1 or "
            "more.",
        ),
        ({"nginx_hsts_max_age": -1}, "nginx_hsts_max_age is -1; allowed: 0 or more."),
        (
            {"nginx_acme_directory_url": "http://acme.example", "nginx_server_names": ["a.example.org"]},
            "nginx_acme_directory_url is 'http://acme.example'; allowed: a URL that begins with https:// or an empty string.",
        ),
        ({"nginx_acme_email": "me"}, "nginx_acme_email is 'me'; allowed: an email address or an empty string."),
        (
            {**ACME, "nginx_server_names": ["a.example.org", ".example.org", "localhost", "192.0.2.1"]},
            "nginx_server_names has .example.org, localhost, 192.0.2.1; with nginx_acme_directory_url, it must have one or more "
            "host names such as shop.example.org.",
        ),
        (
            {**ACME, "nginx_server_names": []},
            "nginx_server_names is empty; with nginx_acme_directory_url, it must have one or more host names such as "
            "shop.example.org.",
        ),
        (
            {"nginx_acme_other_proxies": ["proxy2", "proxy3:80"]},
            "nginx_acme_other_proxies has proxy3:80; allowed: host names, IPv4 addresses, and IPv6 addresses in brackets.",
        ),
    ],
}
REFUSED |= {
    "monitoring types": [
        (
            {"monitoring_exporters": ["redis"]},
            "monitoring_exporters[0] is 'redis'; allowed: node, postgresql.",
        ),
        (
            {"monitoring_retention_day": 3},
            "monitoring_retention_day is not a variable of the role monitoring, did you mean monitoring_retention_days?",
        ),
    ],
    "monitoring": [
        (
            {"monitoring_name": "My Shop"},
            "monitoring_name is 'My Shop'; allowed: a lower-case word of at most 24 letters, digits and hyphens.",
        ),
        (
            {"monitoring_address": "localhost"},
            "monitoring_address or monitoring_exporter_address is localhost; allowed: IPv4 addresses, also 0.0.0.0.",
        ),
        (
            {"monitoring_units": ["a b", "c"]},
            "monitoring_units has 'a b', 'c'; allowed: regular expressions without spaces.",
        ),
        (
            {"monitoring_exporters": ["postgresql"], "monitoring_postgresql_url": f"postgresql://{MARK}"},
            "monitoring_postgresql_url must begin with postgresql://user:password@, because monitoring_exporters has postgresql.",
        ),
        ({"monitoring_server": True, "monitoring_password": MARK[:11]}, "monitoring_password must have at least 12 characters."),
        (
            {"monitoring_scrapes": [{"job": name, "targets": [{"host": "a", "address": address}]} for name, address in SCRAPES]},
            "monitoring_scrapes has the addresses web1, 1:2:3; allowed: addresses with ports, such as 192.0.2.10:9100.",
        ),
        (
            {"monitoring_scrapes": [{"job": name, "targets": []} for name in ("one", "one")]},
            "monitoring_scrapes has the jobs one, one; each job must be unique.",
        ),
        (
            {"monitoring_scrape_interval": 0, "monitoring_retention_days": 7},
            "monitoring_scrape_interval and monitoring_retention_days are 0 and 7; allowed: 1 or more.",
        ),
        (
            {"monitoring_retention_size": "5 GB"},
            "monitoring_retention_size is '5 GB'; allowed: sizes such as 500MB or 5GB.",
        ),
        ({"monitoring_journal_size": "2 GB"}, "monitoring_journal_size is '2 GB'; allowed: sizes such as 500M or 2G."),
        ({"monitoring_journal_days": 0}, "monitoring_journal_days is 0; allowed: 1 or more."),
        ({"monitoring_rules": ["/nowhere.yml"]}, "/nowhere.yml in monitoring_rules is not a file on the controller."),
        (
            {"monitoring_alert_emails": ["me"], "monitoring_alert_sender": "a@example.org"},
            "monitoring_alert_emails has me; allowed: email addresses.",
        ),
        (
            {"monitoring_alert_emails": ["a@example.org"], "monitoring_alert_sender": ""},
            "monitoring_alert_sender is ''; allowed: an email address.",
        ),
        (
            {
                "monitoring_alert_emails": ["a@example.org"],
                "monitoring_alert_sender": "a@example.org",
                "monitoring_alert_mail_url": f"smtp+ssl://me:{MARK}@mail:2465",
            },
            "monitoring_alert_mail_url has the scheme smtp+ssl, which Alertmanager supports only at port 465; allowed: a",
        ),
        (
            {"monitoring_alert_webhooks": [f"hooks/{MARK}"]},
            "monitoring_alert_webhooks has a value that does not begin with http:// or https://.",
        ),
    ],
}
BY_SFTP = {
    "backups_repository": "sftp:backup@store.example.org:/srv/backups",
    "backups_ssh_key": f"-----BEGIN {'OPENSSH'} PRIVATE KEY-----\n{MARK}\n",
    "backups_ssh_known_hosts": "store.example.org ssh-ed25519 AAAA",
}
REFUSED |= {
    "backups types": [
        ({"backups_keep_daily": "seven"}, "backups_keep_daily is 'seven', not a whole number."),
        ({"backups_keep_yearly": 1}, "backups_keep_yearly is not a variable of the role backups"),
        ({"backups_schedule": 150}, "backups_schedule is 150, not a quoted string."),
    ],
    "backups": [
        (
            {"backups_name": "My Shop"},
            "backups_name is 'My Shop'; allowed: a lower-case word of at most 24 letters, digits and hyphens.",
        ),
        *(
            (
                {"backups_repository": repository},
                f"backups_repository is '{repository}'; allowed: an absolute path, sftp:user@host:/path, "
                "s3:https://host/bucket, or an empty string.",
            )
            for repository in ("srv/backups", "/", "/srv/my backups", "sftp:backup@store", "s3:https://s3.example.org", "ftp://a/b")
        ),
        (
            {"backups_repository": "/srv/backups", "backups_password": MARK[:11]},
            "backups_password must have at least 12 characters, because backups_repository is set.",
        ),
        (
            {**BY_SFTP, "backups_ssh_key": MARK},
            "backups_ssh_key is not a private SSH key, which backups_repository needs for sftp.",
        ),
        (
            {**BY_SFTP, "backups_ssh_known_hosts": " "},
            "backups_ssh_known_hosts is empty; required for sftp: the server's host keys, as printed by ssh-keyscan.",
        ),
        (
            {"backups_environment": {"AWS KEY": MARK}},
            "backups_environment has a wrong value: 'AWS KEY' is not a valid name of an environment variable.",
        ),
        (
            {"backups_environment": {"RESTIC_PASSWORD": MARK}},
            "backups_environment has RESTIC_PASSWORD or RESTIC_REPOSITORY; set backups_password and backups_repository instead.",
        ),
        *(
            (
                {"backups_schedule": schedule},
                f"backups_schedule is '{schedule}'; allowed: hourly, or the time of a daily backup, such as 02:30.",
            )
            for schedule in ("weekly", "24:00", "2:30")
        ),
        (
            {"backups_keep_daily": 0, "backups_keep_weekly": 0, "backups_keep_monthly": 0},
            "backups_keep_daily, backups_keep_weekly and backups_keep_monthly are 0, 0, 0; allowed: 0 or more, and at least one "
            "must be 1 or more, because otherwise no backup is kept.",
        ),
        (
            {"backups_keep_weekly": -1},
            "backups_keep_daily, backups_keep_weekly and backups_keep_monthly are 7, -1, 12; allowed: 0 or more",
        ),
        (
            {"backups_databases": ["shop", "it's"]},
            "backups_databases has 'it's'; allowed: names of letters, digits, underscores and hyphens.",
        ),
        (
            {"backups_metrics_directory": "metrics"},
            "backups_metrics_directory is 'metrics'; allowed: an absolute path without spaces, or an empty string.",
        ),
        (
            {"backups_broker_url": f"http://admin:{MARK}/127.0.0.1"},
            "backups_broker_url has a wrong format; allowed: http://user:password@host:port, https, or an empty string.",
        ),
        (
            {"backups_snapshot": "yesterday"},
            "backups_snapshot is 'yesterday'; allowed: latest, or a snapshot's ID of at least 8 characters.",
        ),
    ],
}
# The cases by host group: the variables of each case, and its warning.
ACCEPTED = {
    "backups accepted": [
        ({}, ""),
        ({"backups_repository": "/srv/backups", "backups_schedule": "hourly", "backups_keep_daily": 0}, ""),
        (BY_SFTP, ""),
        ({**BY_SFTP, "backups_repository": "sftp://backup@store.example.org:2222//srv/backups"}, ""),
        ({"backups_repository": "s3:https://s3.example.org/bucket", "backups_environment": {"AWS_ACCESS_KEY_ID": "a"}}, ""),
    ],
    "rabbitmq accepted": [
        ({}, ""),
        (versions("4.3", "29"), "WARNING: RabbitMQ 4.3 on Erlang 29"),
        ({**versions("4.2.8", "26.2.5"), "rabbitmq_listeners": ["[::1]:5672"]}, ""),
        ({"rabbitmq_erlang_cookie": MARK[:20], "secret_rabbitmq_app_password": "{{ 'quoted' ~ 'A1' }}"}, ""),
        # The distribution ships the versions in the inventory. The tables don't contain this platform.
        ({"host_platform": "ubuntu2604", "rabbitmq_version": "4.1", "erlang_version": "27"}, ""),
    ],
    "postgresql accepted": [({}, "")],
    "common accepted": [
        ({"secret_smtp_password": f"{MARK}smtp", "app_environment": {"EMAIL_TIMEOUT": 5}}, ""),
        ({"app_environment": {"ANYTHING": 1}, "app_environment_names": []}, ""),
    ],
    "firewall accepted": [
        ({"firewall_enabled": True, "firewall_rules": [{"ports": [443]}, {"ports": [22], "sources": ["::1", "web1"]}]}, "")
    ],
    "django accepted": [
        ({}, ""),
        (
            {
                "django_source": "{{ project_without_manage }}",
                "django_manage": "django",
                "django_wsgi": "config.wsgi:application",
                "django_data_directories": ["media", "logs/old"],
                "django_system_packages": {"Debian": ["gettext"]},
                "django_build_environment": {"DEBUG": True},
                "django_build_commands": [{"command": ["python", "-m", "django", "compilemessages"], "directory": "shop"}],
            },
            "",
        ),
        ({"django_subdirectory": "emails", "django_manage": "management/commands/relay.py", "django_dependency_groups": ["a"]}, ""),
    ],
    "celery accepted": [
        ({}, ""),
        ({"celery_requirements": "{{ lock_5_5 }}", "rabbitmq_permitted_deprecated_features": ["transient_nonexcl_queues"]}, ""),
        (
            {"celery_requirements": "{{ lock_5_6 }}"},
            "WARNING: Celery 5.6.0 starts on a broker that denies transient non-exclusive queues only if the project sets",
        ),
    ],
    "flower accepted": [({}, "")],
    "monitoring accepted": [
        ({}, ""),
        ({"monitoring_server": True, "monitoring_install": False, "monitoring_password": ""}, ""),
        ({"monitoring_alert_emails": ["a@example.org"], "monitoring_alert_sender": "b@example.org"}, ""),
    ],
    "nginx accepted": [
        ({}, ""),
        ({"nginx_certificate": "/c.pem", "nginx_certificate_key": "/k.pem", "nginx_upstreams": ["/run/web.sock"]}, ""),
        ({**ACME, "nginx_server_names": ["a.example.org"], "nginx_acme_email": "a@example.org"}, ""),
    ],
}
# The variables of an environment other than its secrets.
ENVIRONMENT = {"service_address": "localhost", "app_allowed_senders": ["@example.org"]}


def expanded(value, task_vars, seen=()):
    """The names that a value reads, directly or through the task's variables."""
    for name in names_in(value):
        yield name
        if name in task_vars and name not in seen:
            yield from expanded(task_vars[name], task_vars, (*seen, name))


def read_together():
    """One set of variables per rule of a role. Cases with variables of the same set could change each other's message."""
    sets = []
    for file in sorted(ROOT.glob("roles/*/tasks/validate.yml")):
        role = file.parts[-3]
        for task in yaml.safe_load(file.read_text()):
            for rules in (value for value in task.get("vars", {}).values() if isinstance(value, list)):
                for rule in rules:
                    # The first key is the condition. The message may contain variables that the condition does not read.
                    condition = next(iter(rule.values()))
                    sets.append({name for name in expanded(condition, task["vars"]) if name.startswith(f"{role}_")})
    return sets


with warnings.catch_warnings():
    # Jinja prints warnings about escapes in regular expressions.
    warnings.simplefilter("ignore", DeprecationWarning)
    TOGETHER = read_together()


def test_variables_that_a_rule_reads_together_are_found():
    assert {"django_source", "django_requirements"} in TOGETHER
    assert {"rabbitmq_purge", "rabbitmq_purge_vhosts"} in TOGETHER
    hosts = pack({"django": [({"django_source": ""}, "a"), ({"django_requirements": ""}, "b"), ({"django_wsgi": ""}, "c")]})
    assert [sentences for _, _, sentences in hosts] == [["a", "c"], ["b"]]


def related(variables):
    """The variables, and all variables that a rule reads together with one of them."""
    return variables.keys() | {name for names in TOGETHER if names & variables.keys() for name in names}


def pack(groups):
    """Triples of a host, its variables and its messages.

    Two cases share a host of their group if no rule reads variables of both cases.
    """
    hosts = []
    for group, cases in groups.items():
        own = []
        for variables, sentence in cases:
            host = next((host for host in own if group in REFUSED and not host[1].keys() & related(variables)), None)
            if host is None:
                # Names in .invalid never resolve (RFC 6761).
                host = (f"{group}-{len(own)}.invalid".replace(" ", "-").replace("_", "-"), {}, [])
                own.append(host)
            host[1].update(variables)
            host[2].append(sentence)
        hosts += own
    return hosts


REFUSALS = [(host, sentence) for host, _, sentences in pack(REFUSED) for sentence in sentences]
WARNINGS = [(host, sentence) for host, _, sentences in pack(ACCEPTED) for sentence in sentences]


def write_inventory(folder, hosts):
    """Puts each host into the group of the role that its name starts with."""
    common_variables(folder)
    for version in ("5.5.3", "5.6.0"):
        (folder / f"lock-{version}.txt").write_text(f"celery=={version} --hash=sha256:00\n")
    locks = {"lock_5_5": str(folder / "lock-5.5.3.txt"), "lock_5_6": str(folder / "lock-5.6.0.txt")}
    project = folder / "project-without-hashes"
    project.mkdir()
    (project / "manage.py").touch()
    (project / "requirements.txt").write_text("celery==5.7.0\n")
    locks["project_without_hashes"] = str(project)
    package = folder / "project-without-manage"
    package.mkdir()
    (package / "requirements.txt").write_text("gunicorn==27.0.1 --hash=sha256:00\n")
    locks["project_without_manage"] = str(package)
    # The variables in wiring.yml need a host in these groups.
    names = ("broker", "app", "web", "workers", "flower", "database", "cache", "proxy")
    groups = {name: {"hosts": {"first.invalid": None}} for name in names}
    for host, _, _ in hosts:
        layer = LAYERS.get(host.split("-")[0])
        # Workers use the application's release.
        for group in (layer, "app") if layer == "workers" else (layer,):
            if group:
                groups[group]["hosts"][host] = None
    everybody = {host: {**own_environment(host), **variables} for host, variables, _ in hosts}
    everybody["first.invalid"] = {"wiring_brokers": ["first.invalid"], "wiring_standbys": []}
    inventory = {"all": {"hosts": everybody, "vars": {**ENVIRONMENT, **locks}, "children": groups}}
    (folder / "hosts.json").write_text(json.dumps(inventory))
    return folder


def own_environment(host):
    """Makes each host a separate environment, as in scenarios, so that there can be several brokers, databases and caches."""
    layer = LAYERS.get(host.split("-")[0])
    # Resolving the other hosts' addresses would take most of the run.
    if layer == "broker":
        return {"wiring_brokers": ["{{ inventory_hostname }}"], "wiring_broker_clients": []}
    if layer in ("database", "cache"):
        separate = {"wiring_standbys": []} if layer == "database" else {}
        return {f"wiring_{layer}": "{{ inventory_hostname }}", f"wiring_{layer}_clients": [], **separate}
    return {}


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """The exit code, the results per host, the counts and the output of one run with all cases."""
    folder = write_inventory(tmp_path_factory.mktemp("refusals"), pack({**REFUSED, **ACCEPTED}))
    code, answer, output = playbook("-i", folder, "playbooks/validate.yml", ANSIBLE_STRATEGY="free", ANSIBLE_FORKS="4")
    results = {}
    for task in (task for play in answer["plays"] for task in play["tasks"]):
        for host, result in task["hosts"].items():
            results.setdefault(host, []).append(result)
    return code, results, answer["stats"], output


@pytest.mark.parametrize(("host", "sentence"), REFUSALS)
def test_wrong_value_is_refused_with_a_helpful_message(validation, host, sentence):
    refusal, last = [result["msg"] for result in validation[1][host] if result.get("failed")]
    # The message, not the role's argument specs, is the last output.
    assert refusal.count(sentence) == 1
    assert last.count(sentence) == 1
    assert "argument_spec_data" not in validation[1][host][-1]


@pytest.mark.parametrize(("host", "warning"), WARNINGS)
def test_valid_value_is_accepted(validation, host, warning):
    assert [result["msg"] for result in validation[1][host] if result.get("failed")] == []
    said = " ".join(str(result.get("msg", "")) for result in validation[1][host])
    assert warning in said
    assert ("WARNING" in said) == bool(warning)


def test_run_fails_without_contacting_a_host_or_showing_a_secret(validation):
    code, _, stats, output = validation
    assert code == 2
    assert {host: numbers["unreachable"] for host, numbers in stats.items() if numbers["unreachable"]} == {}
    assert stats["first.invalid"]["failures"] == 0
    assert MARK[:11] not in output


def test_every_role_is_validated_and_has_a_case():
    validated = (ROOT / "playbooks/validate.yml").read_text()
    with_validation = [path.parts[-3] for path in ROOT.glob("roles/*/tasks/validate.yml")]
    assert [role for role in with_validation if f"name: django_celery.stack.{role}\n" not in validated] == []
    assert sorted({group.split()[0] for group in REFUSED} - {"common"}) == sorted(with_validation)


def test_one_wrong_value_ends_the_whole_site(tmp_path):
    hosts = [("flower-wrong.invalid", {"flower_port": 70000}, []), ("rabbitmq-right.invalid", {}, [])]
    code, answer, output = playbook("-i", write_inventory(tmp_path, hosts), "site.yml")
    assert code == 2
    assert [play["play"]["name"] for play in answer["plays"]] == ["Validate the variables"]
    assert sum(numbers["failures"] for numbers in answer["stats"].values()) == 1
    assert sum(numbers["unreachable"] for numbers in answer["stats"].values()) == 0
    assert "flower_port is 70000" in output


NO_DATABASE = (
    "The application has no database: the group database has no host, and app_database_url is empty. Put a host into the group "
    "database, or set app_database_url to the URL of another server, such as postgresql://user:password@host:5432/name."
)


NO_BROKER = (
    "The application has no broker: the group broker has no host, and app_broker_url is empty. Put a host into the group broker, "
    "or set app_broker_url to the URL of another broker, such as amqps://user:password@host:5671/vhost."
)


@pytest.mark.parametrize("hosts", [None, {}], ids=["no group", "no host in it"])
def test_inventory_without_a_broker_is_refused(tmp_path, hosts):
    code, answer, output = playbook("-i", without_broker(tmp_path, hosts), "site.yml")
    assert code == 2
    assert [play["play"]["name"] for play in answer["plays"]] == ["Validate the variables"]
    assert answer["plays"][0]["tasks"][-1]["hosts"]["app.invalid"]["msg"] == NO_BROKER, output


def test_external_broker_needs_no_group(tmp_path):
    elsewhere = f"amqps://shop:{MARK}@mq.example.org:5671/shop"
    inventory = without_broker(tmp_path, None, app_broker_url=elsewhere, flower_broker_url=elsewhere)
    code, _, output = playbook("-i", inventory, "playbooks/validate.yml")
    assert code == 0, output
    assert MARK not in output


def without_broker(folder, hosts, **variables):
    """An inventory with one application host, and either no group broker or one with the given hosts."""
    folder = without_database(folder, {"database": {"hosts": {"app.invalid": None}}}, **variables)
    inventory = json.loads((folder / "hosts.json").read_text())
    groups = inventory["all"]["children"]
    del groups["broker"]
    groups.update({} if hosts is None else {"broker": {"hosts": hosts}})
    (folder / "hosts.json").write_text(json.dumps(inventory))
    return folder


@pytest.mark.parametrize("groups", [{}, {"database": {"hosts": {}}}], ids=["no group", "no host in it"])
def test_inventory_without_a_database_is_refused(tmp_path, groups):
    code, answer, output = playbook("-i", without_database(tmp_path, groups), "site.yml")
    assert code == 2
    assert [play["play"]["name"] for play in answer["plays"]] == ["Validate the variables"]
    assert {host: numbers["unreachable"] for host, numbers in answer["stats"].items()} == {"app.invalid": 0, "mq.invalid": 0}
    assert answer["plays"][0]["tasks"][-1]["hosts"]["app.invalid"]["msg"] == NO_DATABASE, output


def test_external_database_needs_no_group(tmp_path):
    elsewhere = f"postgresql://shop:{MARK}@db.example.org:5432/shop"
    inventory = without_database(tmp_path, {}, app_database_url=elsewhere)
    code, _, output = playbook("-i", inventory, "playbooks/validate.yml")
    assert code == 0, output
    assert MARK not in output


def without_database(folder, groups, **variables):
    """An inventory with two hosts and no database host."""
    common_variables(folder)
    app = {"hosts": {"app.invalid": None}}
    groups = {"broker": {"hosts": {"mq.invalid": None}}, "app": {"children": {"web": app, "workers": app}}, "flower": app, **groups}
    (folder / "hosts.json").write_text(json.dumps({"all": {"children": groups}}))
    (folder / "group_vars/all/30-environment.json").write_text(json.dumps({**ENVIRONMENT, **variables}))
    return folder


def test_missing_inventory_is_an_error():
    command = [Path(sys.executable).parent / "ansible-playbook", "-i", "inventories/prodcution", "site.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No inventory was parsed" in done.stderr
