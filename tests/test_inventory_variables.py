"""Mistakes of an inventory as a whole: its groups, its secrets, how many hosts a group has, and what inventories/common knows."""

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
    url_error,
)
from helpers import MARK, ROOT, common_variables, playbook, wiring

GROUPS = {name: ["a"] for name in ("all", "ungrouped", "broker", "app", "web", "workers", "flower", "database")}
EXPECTED = "Required are broker, and app with web and workers in it. Optional are database and flower."


def without(*names, **more):
    return {name: hosts for name, hosts in GROUPS.items() if name not in names} | more


# Groups


def test_all_groups_and_only_those_that_are_needed_are_no_error():
    assert group_errors(GROUPS) == []
    assert group_errors(without("flower", "database", all_hosts=["a"], databases_of_others=["b"])) == []
    # One without hosts is there too: an environment that wants none says so.
    assert group_errors(without("workers", workers=[])) == []


@pytest.mark.parametrize("name", ["broker", "app", "web", "workers"])
def test_a_group_that_is_needed_is_named_with_those_that_are_there(name):
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
def test_a_misspelt_group_is_refused_though_it_may_be_absent(name, written):
    sentence = f"The inventory has no group {name}, but a group {written}; did you mean {name}?"
    assert group_errors(without(name, **{written: ["a"]}))[0] == sentence


def test_a_host_of_web_or_workers_is_one_of_app():
    assert group_errors(without("web", web=["a", "b", "c"])) == [
        "The group web has b, c, which the group app lacks: make web a child of app."
    ]


@pytest.mark.parametrize(
    ("one", "other", "mistakes"),
    [("web", "web", 0), ("wbe", "web", 1), ("database", "databse", 1), ("", "ab", 2), ("abc", "cab", 2)],
)
def test_distance_counts_mistakes_in_typing(one, other, mistakes):
    assert distance(one, other) == distance(other, one) == mistakes


@pytest.mark.parametrize(("group", "variable"), [("broker", "wiring_broker"), ("database", "wiring_database")])
def test_a_second_host_is_refused_unless_each_is_an_environment_of_its_own(group, variable):
    groups = {"broker": ["a"], "database": ["a"], group: ["a", "b"]}
    assert host_count_errors("b", groups, {variable: "b"}) == []
    assert host_count_errors("c", groups, {variable: "a"}) == []
    (sentence,) = host_count_errors("b", groups, {variable: "a"})
    assert sentence == (
        f"The group {group} has the hosts a, b; allowed is one, or several if each host is a separate environment, with "
        f"{variable} set to the host's name."
    )


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
    """What the first play says at last, of an inventory that it refuses."""
    code, answer, output = playbook("-i", folder, "playbooks/validate.yml", **environment)
    assert code == 2, output
    assert MARK not in output
    failed = [result["msg"] for result in answer["plays"][0]["tasks"][-1]["hosts"].values() if result.get("failed")]
    return failed[0]


def test_a_misspelt_group_ends_the_run(tmp_path):
    groups = groups_of("host.invalid")
    groups["databse"] = groups.pop("database")
    assert refusal(inventory(tmp_path, groups)) == (
        "The inventory has no group database, but a group databse; did you mean database? Its groups are broker, app, web, "
        f"workers, databse. {EXPECTED}"
    )


def test_a_second_broker_ends_the_run(tmp_path):
    groups = groups_of("one.invalid", broker={"hosts": {"one.invalid": None, "two.invalid": None}})
    assert refusal(inventory(tmp_path, groups)).startswith(
        "The group broker has the hosts one.invalid, two.invalid; allowed is one, or several"
    )


def test_a_host_of_each_platform_is_accepted(tmp_path):
    """As scenarios have them, with molecule/platforms.yml."""
    folder = inventory(tmp_path, groups_of("one.invalid", "two.invalid"))
    (folder / "group_vars/all/25-platforms.yml").symlink_to(ROOT / "molecule/platforms.yml")
    code, _, output = playbook("-i", folder, "playbooks/validate.yml")
    assert code == 0, output


def test_flower_and_the_database_may_be_absent(tmp_path):
    groups = groups_of("host.invalid")
    del groups["database"]
    code, _, output = playbook("-i", inventory(tmp_path, groups, app_database_url="postgresql://db/shop"), "playbooks/validate.yml")
    assert code == 0, output


def test_without_secrets_the_error_has_the_command_that_generates_them(tmp_path):
    said = refusal(inventory(tmp_path, groups_of("host.invalid"), secrets=False))
    names = ", ".join(wiring()["secret_names"])
    command = f"ansible-playbook -i {tmp_path} playbooks/ops/create_secrets.yml"
    assert said == f"Secrets are missing: {names}. Generate them: {command}"


def test_a_secret_that_is_nearly_called_like_one_that_is_missing_is_refused(tmp_path):
    folder = inventory(tmp_path, groups_of("host.invalid"), secret_smtp_password=f"{MARK}own")
    file = folder / "group_vars/all/91-secrets.yml"
    file.write_text(file.read_text().replace("secret_django_key", "secret_djagno_key"))
    said = refusal(folder)
    assert said.startswith(
        "secret_djagno_key is not a secret of inventories/common; did you mean secret_django_key, which is missing? "
        "Secrets are missing: secret_django_key. Generate them: "
    )
    assert "smtp" not in said


def test_an_inventory_without_the_link_is_told_of_it(tmp_path):
    folder = inventory(tmp_path, groups_of("host.invalid"))
    (folder / "group_vars/all/00-common").unlink()
    assert refusal(folder).startswith("The inventory has no folder group_vars/all/00-common: link inventories/common there,")


def test_a_project_of_ones_own_has_its_own_variables(tmp_path):
    """The description in docs/own-project.md, in the place of application.yml, with a variable more."""
    (own,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/own-project.md").read_text(), re.DOTALL)
    folder = inventory(tmp_path, groups_of("host.invalid"), app_colour="blue", secret_payment_key=f"{MARK}payment")
    common = folder / "group_vars/all/00-common"
    common.unlink()
    common.mkdir()
    (common / "wiring.yml").symlink_to(ROOT / "inventories/common/wiring.yml")
    project = tmp_path / "shop"
    project.mkdir()
    (project / "manage.py").touch()
    (project / "requirements.txt").write_text("celery==5.7.0 --hash=sha256:00\n")
    text = own.replace("/path/to/shop # on the controller", str(project))
    (common / "application.yml").write_text(text + "app_colour: green\napp_token: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  3030\n")
    code, _, output = playbook("-i", folder, "playbooks/validate.yml")
    assert code == 0, output
    (common / "application.yml").write_text(text)
    assert "app_colour is not a variable of inventories/common" in refusal(folder)


def test_an_encrypted_secret_is_a_text(tmp_path):
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
def test_urls_that_are_right(url):
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
def test_a_malformed_url_is_not_shown(url, error):
    sentence = url_error("app_email_url", url, SCHEMES)
    assert sentence.startswith(
        f"app_email_url has {error}; allowed is a URL such as smtp://host:port, with the scheme smtp, smtp+tls"
    )
    assert MARK not in sentence


# What inventories/common says of the application


def reads():
    """The names of all environment variables that the application's settings read."""
    readers = {"boolean", "number", "choice", "url", "limits"}
    for file in ("settings.py", "environment.py"):
        for node in ast.walk(ast.parse((ROOT / "app/mailroom" / file).read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = ast.unparse(node.func)
                if function in readers or function.startswith("env."):
                    yield node.args[0].value


def test_the_known_names_of_app_environment_are_those_that_the_application_reads():
    common = yaml.safe_load((ROOT / "inventories/common/application.yml").read_text())
    assert common["app_environment_names"] == sorted(set(reads()))
    documented = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "app/README.md").read_text(), re.MULTILINE)
    assert sorted(documented) == common["app_environment_names"]


def test_what_is_specified_is_there():
    files = {name: yaml.safe_load((ROOT / f"inventories/common/{name}.yml").read_text()) for name in ("application", "wiring")}
    for name, prefix in (("application", "app"), ("wiring", "wiring")):
        assert files[name][f"{prefix}_variable_specs"].keys() <= files[name].keys()


def test_paths_in_sentences_are_short():
    assert str(inventory_variables.shortest(f"{os.getcwd()}/inventories/x")) == "inventories/x"
    assert str(inventory_variables.shortest("/elsewhere/x")) == "/elsewhere/x"


def test_values_that_fail_for_one_reason_are_one_sentence():
    from jinja2 import UndefinedError

    def resolve(name):
        raise UndefinedError("'x' is undefined")

    values = inventory_variables.Values(SimpleNamespace(resolve=resolve), ["a", "b"])
    assert values.errors_of("a", lambda value: [value]) == values.errors_of("b", lambda value: [value]) == []
    assert values.failures() == ["a, b can't be evaluated: 'x' is undefined"]
