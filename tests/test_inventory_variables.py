"""Tests the errors for a whole inventory: groups, secrets, hosts per group, and variables that are not in inventories/common."""

from __future__ import annotations

import ast
import json
import os
import re
from types import SimpleNamespace

import pytest
import yaml
from ansible_collections.django_celery.stack.plugins.filter import inventory_variables
from ansible_collections.django_celery.stack.plugins.filter.inventory_variables import (
    distance,
    group_errors,
    host_count_errors,
    monitoring_errors,
    url_error,
)
from helpers import MARK, ROOT, common_variables, playbook, wiring
from jinja2 import UndefinedError

GROUPS = {name: ["a"] for name in ("all", "ungrouped", "broker", "app", "web", "workers", "flower", "database", "proxy")}
EXPECTED = (
    "The group app is required, with the groups web and workers in it. The groups broker, database, cache, flower, proxy and "
    "monitoring are optional."
)


def without(*names, **more):
    return {name: hosts for name, hosts in GROUPS.items() if name not in names} | more


# Groups


def test_all_groups_and_required_groups_are_accepted():
    assert group_errors(GROUPS) == []
    assert group_errors(without("flower", "database", "proxy", all_hosts=["a"], databases_of_others=["b"])) == []
    # An environment without hosts in a required group declares an empty group.
    assert group_errors(without("workers", workers=[])) == []


@pytest.mark.parametrize("name", ["app", "web", "workers"])
def test_missing_group_is_reported_with_the_existing_ones(name):
    others = [group for group in without(name) if group not in ("all", "ungrouped")]
    assert group_errors(without(name)) == [f"The inventory has no group {name}.", f"Its groups are {', '.join(others)}. {EXPECTED}"]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("database", "databse"),
        ("database", "databases"),
        ("flower", "flowers"),
        ("workers", "worker"),
        ("web", "webs"),
        ("app", "apps"),
        ("broker", "borker"),
    ],
)
def test_misspelt_optional_group_is_refused(name, written):
    sentence = f"The inventory has no group {name}, but a group {written}; did you mean {name}?"
    assert group_errors(without(name, **{written: ["a"]}))[0] == sentence


def test_hosts_of_web_and_workers_must_be_in_app():
    assert group_errors(without("web", web=["a", "b", "c"])) == [
        "The group web has b, c, which the group app lacks: make web a child of app."
    ]


@pytest.mark.parametrize(
    ("one", "other", "mistakes"),
    [("web", "web", 0), ("wbe", "web", 1), ("database", "databse", 1), ("", "ab", 2), ("abc", "cab", 2)],
)
def test_distance_counts_typing_errors(one, other, mistakes):
    assert distance(one, other) == distance(other, one) == mistakes


def test_second_cache_is_refused_unless_each_is_a_separate_environment():
    groups = {"broker": ["a"], "cache": ["a", "b"]}
    assert host_count_errors("b", groups, {"wiring_cache": "b"}) == []
    assert host_count_errors("c", groups, {"wiring_cache": "a"}) == []
    (sentence,) = host_count_errors("b", groups, {"wiring_cache": "a"})
    assert sentence == (
        "The group cache has the hosts a, b; allowed: one, or several if each host is a separate environment, with "
        "wiring_cache set to the host's name."
    )


def test_database_has_one_standby():
    values = {"wiring_database": "a", "wiring_standbys": ["b"], "host_platform": "debian13"}
    assert [host_count_errors(host, {"database": ["a", "b"]}, values) for host in ("a", "b", "web1")] == [[], [], []]
    (sentence,) = host_count_errors("b", {"database": ["a", "b", "c"]}, values)
    assert sentence == (
        "The group database has the hosts a, b, c; allowed: one host; two hosts, if one is a standby; or several hosts, if each "
        "one is a separate environment with wiring_database set to its name and wiring_standbys set to []."
    )
    assert host_count_errors("b", {"database": ["a", "b", "c"]}, {"wiring_database": "b", "wiring_standbys": []}) == []


def test_primary_is_a_host_of_the_group():
    values = {"wiring_database": "c", "wiring_standbys": ["a", "b"], "host_platform": "debian13"}
    (sentence,) = host_count_errors("a", {"database": ["a", "b"]}, values)
    assert sentence == "wiring_database is 'c'; allowed: a host of the group database, a or b."


def test_database_on_a_mac_has_no_standby():
    values = {"wiring_database": "a", "wiring_standbys": ["b"], "host_platform": "macos"}
    (sentence,) = host_count_errors("a", {"database": ["a", "b"]}, values)
    assert sentence == (
        "host_platform is 'macos', and the group database has the hosts a, b; allowed: one, because a server on a Mac has no "
        "standby."
    )


@pytest.mark.parametrize("count", [1, 3, 5])
def test_cluster_has_an_odd_number_of_brokers(count):
    brokers = [f"mq{number}" for number in range(count)]
    assert host_count_errors("mq0", {"broker": brokers}, {"wiring_brokers": brokers}) == []


@pytest.mark.parametrize("count", [2, 4])
def test_even_number_of_brokers_is_refused_unless_each_is_a_separate_environment(count):
    brokers = [f"mq{number}" for number in range(count)]
    (sentence,) = host_count_errors("mq0", {"broker": brokers}, {"wiring_brokers": brokers})
    assert sentence == (
        f"The group broker has the hosts {', '.join(brokers)}; allowed: one, three, or a larger odd number. A cluster of two "
        "stops if it loses either broker, and four can lose no more brokers than three can."
    )
    assert host_count_errors("mq0", {"broker": brokers}, {"wiring_brokers": ["mq0"]}) == []


MONITORED = {"broker": ["a"], "monitoring": ["mon1"]}


@pytest.mark.parametrize(
    ("host", "groups", "values"),
    [
        ("a", {"broker": ["a"]}, {"host_platform": "macos"}),
        ("a", {"broker": ["a"], "monitoring": ["a"]}, {"host_platform": "debian13"}),
        ("mon1", MONITORED, {"host_platform": "debian13"}),
        ("a", MONITORED, {"host_platform": "ubuntu2404", "firewall_enabled": True}),
    ],
)
def test_monitoring_is_accepted(host, groups, values):
    assert monitoring_errors(host, groups, values) == []


@pytest.mark.parametrize(
    ("host", "groups", "values", "sentence"),
    [
        (
            "b",
            {"monitoring": ["a", "b"]},
            {"host_platform": "debian13", "firewall_enabled": True},
            "The group monitoring has the hosts a, b; allowed: one.",
        ),
        (
            "a",
            MONITORED,
            {"host_platform": "el9", "firewall_enabled": True},
            "host_platform is 'el9', which does not package Prometheus' exporters, and the group monitoring has mon1; allowed with "
            "monitoring: Debian and Ubuntu.",
        ),
        (
            "a",
            MONITORED,
            {"host_platform": "debian13"},
            "firewall_enabled is false, and the group monitoring has mon1; allowed: true if the monitoring is on another host, "
            "because metrics without a login are then open to the network.",
        ),
    ],
)
def test_monitoring_that_would_fail_or_be_open_to_all_is_refused(host, groups, values, sentence):
    assert monitoring_errors(host, groups, values) == [sentence]


# Whole inventories


def inventory(folder, groups, secrets=True, **variables):
    common_variables(folder)
    if not secrets:
        (folder / "group_vars/all/91-secrets.yml").unlink()
    (folder / "hosts.json").write_text(json.dumps({"all": {"children": groups}}))
    (folder / "group_vars/all/30-environment.json").write_text(json.dumps(variables))
    return folder


def groups_of(*hosts, **more):
    group = {"hosts": dict.fromkeys(hosts)}
    return {"broker": group, "database": group, "app": {"children": {"web": group, "workers": group}}, **more}


def refusal(folder, **environment):
    """The last message of the first play for an inventory that it refuses."""
    code, answer, output = playbook("-i", folder, "playbooks/validate.yml", **environment)
    assert code == 2, output
    assert MARK not in output
    failed = [result["msg"] for result in answer["plays"][0]["tasks"][-1]["hosts"].values() if result.get("failed")]
    return failed[0]


def test_misspelt_group_ends_the_run(tmp_path):
    groups = groups_of("host.invalid")
    groups["databse"] = groups.pop("database")
    assert refusal(inventory(tmp_path, groups)) == (
        "The inventory has no group database, but a group databse; did you mean database? Its groups are broker, app, web, "
        f"workers, databse. {EXPECTED}"
    )


def test_second_broker_ends_the_run(tmp_path):
    groups = groups_of("one.invalid", broker={"hosts": {"one.invalid": None, "two.invalid": None}})
    assert refusal(inventory(tmp_path, groups)).startswith(
        "The group broker has the hosts one.invalid, two.invalid; allowed: one, three"
    )


def test_host_of_each_platform_is_accepted(tmp_path):
    """The hosts have the variables of the scenarios' group platforms."""
    groups = groups_of("one.invalid", "two.invalid")
    folder = inventory(tmp_path, {**groups, "platforms": groups["broker"]})
    (folder / "group_vars/platforms.yml").symlink_to(ROOT / "molecule/inventory/group_vars/platforms.yml")
    code, _, output = playbook("-i", folder, "playbooks/validate.yml")
    assert code == 0, output


def test_flower_and_the_database_may_be_absent(tmp_path):
    groups = groups_of("host.invalid")
    del groups["database"]
    code, _, output = playbook("-i", inventory(tmp_path, groups, app_database_url="postgresql://db/shop"), "playbooks/validate.yml")
    assert code == 0, output


def test_error_about_missing_secrets_has_the_command_that_generates_them(tmp_path):
    said = refusal(inventory(tmp_path, groups_of("host.invalid"), secrets=False))
    names = ", ".join(wiring()["secret_names"])
    command = f"ansible-playbook -i {tmp_path} playbooks/ops/create_secrets.yml"
    assert said == f"Secrets are missing: {names}. Generate them: {command}"


def test_misspelt_secret_is_refused(tmp_path):
    folder = inventory(tmp_path, groups_of("host.invalid"), secret_smtp_password=f"{MARK}own")
    file = folder / "group_vars/all/91-secrets.yml"
    file.write_text(file.read_text().replace("secret_django_key", "secret_djagno_key"))
    said = refusal(folder)
    assert said.startswith(
        "secret_djagno_key is not a secret of inventories/common; did you mean secret_django_key, which is missing? "
        "Secrets are missing: secret_django_key. Generate them: "
    )
    assert "smtp" not in said


def test_missing_link_to_common_is_reported(tmp_path):
    folder = inventory(tmp_path, groups_of("host.invalid"))
    (folder / "group_vars/all/00-common").unlink()
    assert refusal(folder).startswith("The inventory has no folder group_vars/all/00-common: link inventories/common there,")


def test_link_to_common_may_be_in_another_inventory(tmp_path):
    """Ansible also loads the variables of the other inventory's directory."""
    (tmp_path / "hosts").mkdir()
    other = inventory(tmp_path / "common", {})
    (tmp_path / "hosts/hosts.json").write_text(json.dumps({"all": {"children": groups_of("host.invalid")}}))
    code, _, output = playbook("-i", other, "-i", tmp_path / "hosts", "-e", f"wiring_repository={ROOT}", "playbooks/validate.yml")
    assert code == 0, output


def test_own_project_has_its_own_variables(tmp_path):
    """Uses the file of docs/own-project.md instead of application.yml, with an additional variable."""
    (own,) = re.findall(
        r"```yaml\n(# inventories/common/application.yml\n.*?)```", (ROOT / "docs/own-project.md").read_text(), re.DOTALL
    )
    folder = inventory(tmp_path, groups_of("host.invalid"), app_colour="blue", secret_payment_key=f"{MARK}payment")
    common = folder / "group_vars/all/00-common"
    common.unlink()
    common.mkdir()
    (common / "wiring.yml").symlink_to(ROOT / "inventories/common/wiring.yml")
    project = tmp_path / "shop"
    project.mkdir()
    (project / "manage.py").touch()
    packages = ({"name": "celery", "version": "5.7.0"}, {"name": "gunicorn", "version": "27.0.1"})
    lines = ["version = 1", *(f"[[package]]\nname = '{each['name']}'\nversion = '{each['version']}'" for each in packages)]
    (project / "uv.lock").write_text("\n".join(lines))
    text = own.replace("{{ wiring_repository }}/../shop", str(project))
    (common / "application.yml").write_text(text + "app_colour: green\napp_token: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  3030\n")
    code, _, output = playbook("-i", folder, "playbooks/validate.yml")
    assert code == 0, output
    (common / "application.yml").write_text(text)
    assert "app_colour is not a variable of inventories/common" in refusal(folder)


def test_encrypted_secret_is_accepted_as_text(tmp_path):
    from ansible.parsing.vault import VaultLib, VaultSecret

    folder = inventory(tmp_path, groups_of("host.invalid"))
    password = tmp_path / "password"
    password.write_text("open")
    encrypted = VaultLib().encrypt(f"{MARK}inline", secret=VaultSecret(b"open")).decode().replace("\n", "\n  ")
    (folder / "group_vars/all/92-inline.yml").write_text(f"secret_django_key: !vault |\n  {encrypted}\n")
    code, _, output = playbook("-i", folder, "playbooks/validate.yml", ANSIBLE_VAULT_PASSWORD_FILE=str(password))
    assert code == 0, output
    assert MARK not in output


# URLs

SCHEMES = ["smtp", "smtp+tls", "smtp+ssl", "consolemail"]


@pytest.mark.parametrize(
    "url",
    ["smtp://mail_server", "smtp+tls://u:p%40ss@mail.example.org:587", "smtp+ssl://u:p@[::1]:465", "consolemail://"],
)
def test_valid_urls_are_accepted(url):
    assert url_error("app_email_url", url, SCHEMES) is None


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (f"smpt://u:{MARK}@mail.example.org:25", "no scheme or a wrong one"),
        ("mail.example.org:25", "no scheme or a wrong one"),
        ("smtp:mail.example.org", "no scheme or a wrong one"),
        ("", "no scheme or a wrong one"),
        (f"smtp://u:{MARK}@mail.example.org:smtp", "a malformed port or host"),
        (f"smtp://u:{MARK}/x@mail.example.org:25", "a malformed port or host"),
        ("smtp://mail.example.org:70000", "a malformed port or host"),
        ("smtp://[::1:25", "a malformed port or host"),
        ("smtp://mail.example.org:0", "the port 0"),
        (f"smtp+tls://u:{MARK}@:587", "no host"),
        ("smtp://mail example.org:25", "no host"),
    ],
)
def test_malformed_url_is_not_shown(url, error):
    sentence = url_error("app_email_url", url, SCHEMES)
    assert sentence.startswith(
        f"app_email_url has {error}; allowed: a URL such as smtp://host:port, with the scheme smtp, smtp+tls"
    )
    assert MARK not in sentence


# The application's variables in inventories/common


def reads():
    """The environment variables that the application's settings read."""
    readers = {"boolean", "number", "choice", "url", "limits", "networks"}
    for file in ("settings.py", "environment.py"):
        for node in ast.walk(ast.parse((ROOT / "app/mailroom" / file).read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = ast.unparse(node.func)
                if function in readers or function.startswith("env."):
                    yield node.args[0].value


def test_app_environment_names_are_those_that_the_application_reads():
    common = yaml.safe_load((ROOT / "inventories/common/application.yml").read_text())
    assert common["app_environment_names"] == sorted(set(reads()))
    documented = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "app/README.md").read_text(), re.MULTILINE)
    assert sorted(documented) == common["app_environment_names"]


def test_specified_variables_exist():
    files = {name: yaml.safe_load((ROOT / f"inventories/common/{name}.yml").read_text()) for name in ("application", "wiring")}
    for name, prefix in (("application", "app"), ("wiring", "wiring")):
        assert files[name][f"{prefix}_variable_specs"].keys() <= files[name].keys()


def test_paths_in_messages_are_short():
    assert str(inventory_variables.shortest(f"{os.getcwd()}/inventories/x")) == "inventories/x"
    assert str(inventory_variables.shortest("/elsewhere/x")) == "/elsewhere/x"


def test_values_with_the_same_error_share_a_message():
    def resolve(name):
        raise UndefinedError("'x' is undefined")

    values = inventory_variables.Values(SimpleNamespace(resolve=resolve), ["a", "b"])
    assert values.errors_of("a", lambda value: [value]) == values.errors_of("b", lambda value: [value]) == []
    assert values.failures() == ["a, b can't be evaluated: 'x' is undefined"]


# The filter itself, on the variables of one host


COMMON = """\
app_name: shop
app_token: !vault |
  $ANSIBLE_VAULT;1.1;AES256
  3030
app_environment: {}
wiring_port: 1
"""
HOST = {
    "app_name": "shop",
    "app_environment": {},
    "app_environment_names": ["DEBUG", "EMAIL_URL"],
    "app_variable_specs": {
        "app_name": {"type": "str"},
        "app_database_url": {"type": "str", "no_log": True, "url_schemes": ["postgresql", "postgres"]},
    },
    "wiring_variable_specs": {"wiring_port": {"type": "int"}},
    "secret_names": ["secret_one", "secret_two"],
    "secret_one": f"{MARK}1",
    "secret_two": f"{MARK}2",
}


class Failing:
    """A value whose expression can't be evaluated."""

    def __init__(self, reason):
        self.reason = reason


@pytest.fixture
def folder(tmp_path):
    """The folder of an inventory with its own copy of inventories/common."""
    common = tmp_path / "group_vars/all/00-common"
    common.mkdir(parents=True)
    (common / "application.yml").write_text(COMMON)
    names = [name for name in HOST if not name.startswith("secret_o")]
    (common / "wiring.yml").write_text("".join(f"{name}:\n" for name in [*names, "app_database_url"]))
    (common / "notes.txt").write_text("app_note: not read\n")
    (common / "empty.yml").touch()
    return tmp_path


@pytest.fixture
def errors(folder):
    """Returns the filter's errors for a host after some of its variables are replaced.

    A variable with the value None is removed.
    """

    def find(groups=GROUPS, group_names=(), inventory_dir=folder, sources=(str(folder), "/elsewhere/hosts.yml"), **changes):
        variables = {name: value for name, value in {**HOST, **changes}.items() if value is not None}
        magic = {
            "inventory_hostname": "a",
            "groups": groups,
            "group_names": list(group_names),
            "inventory_dir": inventory_dir and str(inventory_dir),
            "ansible_inventory_sources": sources,
        }

        def resolve(name):
            value = {**magic, **variables}[name]
            if isinstance(value, Failing):
                raise UndefinedError(f"A captured exception marker was tripped: {value.reason}")
            return value

        found = inventory_variables.inventory_errors(SimpleNamespace(resolve=resolve), variables.keys())
        assert MARK not in " ".join(found)
        return found

    return find


def test_a_valid_host_has_no_errors(errors):
    assert errors() == []
    assert errors(app_database_url=f"postgresql://u:{MARK}@db/shop", wiring_port=5, app_environment={"DEBUG": True}) == []


def test_group_errors_hide_all_others(errors):
    found = errors(groups=without("web"), app_nmae="shop")
    assert found[0] == "The inventory has no group web."
    assert not any("app_nmae" in sentence for sentence in found)


@pytest.mark.parametrize("inventory_dir", [None, "", "/nowhere"])
def test_an_inventory_without_the_common_variables_is_refused(errors, folder, monkeypatch, inventory_dir):
    # An inventory that is a list of hosts has no folder. The filter must not use the working directory instead.
    monkeypatch.chdir(folder)
    assert errors(inventory_dir=inventory_dir, sources=["a,"]) == [
        "The inventory has no folder group_vars/all/00-common: link inventories/common there, as docs/new-environment.md shows."
    ]


def test_common_names_come_from_every_file_of_variables(folder):
    names = inventory_variables.common_names([None, "/nowhere", str(folder)])
    assert {"app_name", "app_token", "app_database_url"} <= names
    assert "app_note" not in names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("app_nmae", "; did you mean app_name?"),
        ("service_zzzzzzzzzzzz", ". Declare your own variables in inventories/common/application.yml."),
    ],
)
def test_an_unknown_variable_is_refused(errors, name, hint):
    assert errors(**{name: "x"}) == [f"{name} is not a variable of inventories/common{hint}"]


def test_an_unknown_variable_with_another_prefix_is_accepted(errors):
    assert errors(shop_colour="blue", ansible_user="root") == []


def test_missing_secrets_are_listed_with_the_command_for_all_sources(errors, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (sentence,) = errors(secret_one=None, secret_two=None)
    playbook = ROOT / "playbooks/ops/create_secrets.yml"
    sources = f"-i {folder.name} -i /elsewhere/hosts.yml"
    assert sentence == f"Secrets are missing: secret_one, secret_two. Generate them: ansible-playbook {sources} {playbook}"


def test_a_misspelt_secret_is_named_only_while_the_right_one_is_missing(errors):
    found = errors(secret_one=None, secret_onne=f"{MARK}1")
    assert found[0] == "secret_onne is not a secret of inventories/common; did you mean secret_one, which is missing?"
    assert errors(secret_onne=f"{MARK}1", secret_payment=f"{MARK}2") == []


def test_equal_secrets_are_refused(errors):
    assert errors(secret_two=f"{MARK}1") == ["secret_one and secret_two are the same; each secret must be different."]


def test_a_secret_that_is_not_text_is_refused_and_not_compared(errors):
    assert errors(secret_one=5, secret_two=5) == ["secret_one is not a quoted string.", "secret_two is not a quoted string."]


def test_secrets_that_fail_are_one_error_and_hide_the_types(errors):
    vault = Failing("no vault password opens it")
    assert errors(secret_one=vault, secret_two=vault, wiring_port="5") == [
        "secret_one, secret_two can't be evaluated: no vault password opens it"
    ]


def test_a_value_that_contradicts_its_specification_is_refused(errors):
    assert errors(app_name=5, wiring_port="5") == [
        "app_name is 5, not a quoted string.",
        "wiring_port is '5', not a whole number.",
    ]
    (sentence,) = errors(app_database_url=f"mysql://u:{MARK}@db/shop")
    assert sentence.startswith("app_database_url has no scheme or a wrong one; allowed: a URL such as postgresql://host:port")
    # A value of the wrong type gets only the error about its type.
    assert errors(app_database_url=5) == ["app_database_url is not a quoted string."]


def test_a_value_that_fails_is_an_error(errors):
    assert errors(wiring_port=Failing("'x' is undefined"), app_name=5) == [
        "app_name is 5, not a quoted string.",
        "wiring_port can't be evaluated: 'x' is undefined",
    ]


def test_a_team_need_not_specify_its_variables(errors):
    assert errors(app_variable_specs=None, wiring_variable_specs=None, app_name=5) == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [("EMAIL_ULR", "; did you mean EMAIL_URL?"), ("ZZZZ", "; app_environment_names lists the names that it reads.")],
)
def test_an_environment_variable_that_the_application_does_not_read_is_refused(errors, name, hint):
    assert errors(app_environment={name: "x", "DEBUG": True}) == [
        f"app_environment has {name}, which the application does not read{hint}"
    ]


def test_any_environment_variable_is_accepted_where_the_known_ones_are_not_listed(errors):
    assert errors(app_environment={"EMAIL_ULR": "x"}, app_environment_names=None) == []
    assert errors(app_environment=None) == []


def test_variables_of_roles_are_checked_on_the_hosts_that_have_the_roles(errors):
    wrong = {"rabbitmq_verison": "4.2", "rabbitmq_plugins": "a,b", "firewall_enabled": "yes", "celery_beat": Failing("no group")}
    firewall = "firewall_enabled is 'yes', not true or false."
    assert errors(**wrong) == [firewall]
    assert errors(group_names=["broker", "strangers"], **wrong) == [
        firewall,
        "rabbitmq_plugins is 'a,b', not a list.",
        "rabbitmq_verison is not a variable of the role rabbitmq, did you mean rabbitmq_version?",
    ]
    assert errors(group_names=["workers"], **wrong) == [firewall, "celery_beat can't be evaluated: no group"]


VERSIONS = {
    "debian13": {"source": "distribution", "erlang": "27", "rabbitmq": "4.0"},
    "el9": {"source": "team_rabbitmq", "erlang": "27", "rabbitmq": "4.2"},
}
SHIPPED = {"wiring_versions": VERSIONS, "host_platform": "debian13", "rabbitmq_version": "4.0", "erlang_version": "27"}


@pytest.fixture
def broker_errors(errors, folder):
    """Returns the errors for a broker, without errors about names."""
    (folder / "group_vars/all/00-common/versions.yml").write_text("wiring_versions:\nhost_platform:\n")
    return lambda **changes: errors(group_names=["broker"], **SHIPPED | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rabbitmq_version": "4.0.5", "erlang_version": "27.3"},
        {"rabbitmq_version": "4"},
        {"rabbitmq_version": "4.2", "rabbitmq_source": "team_rabbitmq"},
        # The role, not this filter, checks the format of a version.
        {"rabbitmq_version": "4.x"},
        {"rabbitmq_version": "4.3", "host_platform": "el9"},
        {"rabbitmq_version": "4.2", "host_platform": "ubuntu2604"},
    ],
)
def test_possible_versions_are_accepted(broker_errors, changes):
    assert broker_errors(**changes) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rabbitmq_version": "4.2"},
            ("rabbitmq_version is 4.2", "has RabbitMQ 4.0: set rabbitmq_source to team_rabbitmq for another version"),
        ),
        (
            {"erlang_version": "26.2.5", "erlang_source": "distribution"},
            ("erlang_version is 26.2.5", "has Erlang 27: use that version"),
        ),
    ],
)
def test_a_version_that_the_distribution_lacks_is_refused(broker_errors, changes, words):
    given, shipped = words
    assert broker_errors(**changes) == [
        f"{given}, and debian13 (host_platform) {shipped}, or set host_platform to the host's platform."
    ]


def test_versions_are_compared_on_brokers_only(errors, broker_errors):
    assert errors(group_names=["app"], **SHIPPED | {"rabbitmq_version": "4.2"}) == []


def test_host_counts_and_versions_are_reported_together(broker_errors, folder):
    (folder / "group_vars/all/00-common/broker.yml").write_text("wiring_brokers:\n")
    found = broker_errors(groups=without("broker", broker=["a", "b"]), wiring_brokers=["a", "b"], rabbitmq_version="4.2")
    assert [sentence.split(maxsplit=4)[:4] for sentence in found] == [
        ["The", "group", "broker", "has"],
        ["rabbitmq_version", "is", "4.2,", "and"],
    ]
