"""Tests which secrets a rotation replaces, and that rotate_secrets.yml changes nothing else in the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.django_celery.stack.plugins.action import rotate_secrets
from ansible_collections.django_celery.stack.plugins.action.secrets_file import NotAdded
from ansible_collections.django_celery.stack.plugins.modules import rotate_secrets as documentation
from ansible_collections.django_celery.stack.plugins.plugin_utils import rotation
from helpers import MARK, ROOT, common_variables, wiring

KNOWN = wiring()["secret_names"]
GROUPS = ("all", "app", "broker", "database", "cache", "flower", "monitoring")
SECRET = VaultSecret(b"the team's password")
TEXT = f"""\
---
# The provider's.
secret_smtp_password: "{MARK}: #1"   # renewed in May
secret_one: {MARK}one  # ours
secret_two: '{MARK}two'
secret_list:
- {MARK}a

# The end.
"""


def request(*words, groups=GROUPS, emergency=False):
    return rotation.request(words, KNOWN, groups, emergency, "91-secrets.yml")


# What is rotated


def test_every_secret_of_wiring_has_a_description_or_another_procedure():
    assert set(KNOWN) == set(rotation.SECRETS) | (set(rotation.ELSEWHERE) - {"vault_password"})


def test_all_means_every_secret_that_has_no_other_procedure():
    assert set(request("all").names) == set(KNOWN) - {
        "secret_certificate_authority",
        "secret_backups_password",
        "secret_postgresql_archive_password",
    }
    assert request("all").certificates


def test_all_leaves_out_secrets_that_no_host_uses():
    names = request("all", groups=("all", "app")).names
    assert set(names) == {"secret_django_key", "secret_app_admin_password", "secret_app_api_key", "secret_app_metrics_token"}


def test_kinds_and_names_are_allowed_together_and_once():
    wanted = request("flower", "secret_django_key", "secret_flower_cookie")
    assert wanted.names == ("secret_flower_password", "secret_flower_cookie", "secret_django_key")
    assert not wanted.certificates


@pytest.mark.parametrize(
    ("words", "options", "sentence"),
    [
        (
            ["secret_djanga_key"],
            {},
            r"^rotate has secret_djanga_key; allowed: all, finish, certificates, the kinds broker, .*secret_django_key",
        ),
        (["secret_certificate_authority"], {}, "every client must trust the new authority"),
        (["vault_password"], {}, "ansible-vault rekey --new-vault-password-file NEW_FILE 91-secrets.yml"),
        (["database"], {"groups": ("all",)}, "no host in the group database. Change secret_postgresql_app_password where"),
        (["finish", "django"], {}, "can't be combined"),
        (["finish"], {"emergency": True}, "or with rotate_emergency"),
    ],
)
def test_other_requests_are_refused(words, options, sentence):
    with pytest.raises(rotation.Refused, match=sentence):
        request(*words, **options)


def test_secrets_whose_old_value_the_application_refuses_stop_at_once():
    names = ["secret_django_key", "secret_flower_cookie"]
    assert [line.split(":")[0] for line in rotation.before(names, ["secret_django_key"])] == ["secret_flower_cookie"]
    assert [line.split(":")[0] for line in rotation.before(names, [])] == names
    assert [line.split(":")[0] for line in rotation.after(names, ["secret_django_key"])] == ["secret_django_key"]


# The text of the file


def rotated(text, *names, emergency=False):
    return rotate_secrets.rotated(text, names, emergency, iter(["new1", "new2"]).__next__)


def test_only_the_value_changes_and_the_old_one_is_kept_at_the_end():
    text, names = rotated(TEXT, "secret_one", "secret_two")
    assert names == ["secret_one", "secret_two"]
    expected = TEXT.replace(f"{MARK}one", "new1").replace(f"'{MARK}two'", "new2")
    assert text == expected + f"secret_one_old: {MARK}one\nsecret_two_old: {MARK}two\n"


def test_repeated_run_changes_nothing():
    text, _ = rotated(TEXT, "secret_one")
    assert rotated(text, "secret_one") == (text, [])


def test_finish_removes_the_old_values_and_is_repeatable():
    text, _ = rotated(TEXT, "secret_one", "secret_two")
    done, names = rotate_secrets.finished(text, ["secret_one", "secret_two", "secret_list"])
    assert names == ["secret_one", "secret_two"]
    assert done == TEXT.replace(f"{MARK}one", "new1").replace(f"'{MARK}two'", "new2")
    assert rotate_secrets.finished(done, ["secret_one"]) == (done, [])


def test_emergency_keeps_no_old_value_even_of_an_earlier_rotation():
    text, _ = rotated(TEXT, "secret_one")
    done, names = rotate_secrets.rotated(text, ["secret_one"], True, lambda: "newest")
    assert (done, names) == (TEXT.replace(f"{MARK}one", "newest"), ["secret_one"])


@pytest.mark.parametrize("value", ["|\n  lines\n", "!vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  3030\n", "[a]\n"])
def test_other_forms_of_a_value_are_refused(value):
    with pytest.raises(NotAdded, match="no plain value of secret_one"):
        rotated(f"secret_one: {value}", "secret_one")


def test_file_in_brackets_is_refused():
    with pytest.raises(NotAdded, match="can't be changed"):
        rotated("{secret_one: a, secret_two: b}\n", "secret_one")


# The action, without a playbook


def run_action(options, task_vars, check_mode=False):
    task = SimpleNamespace(args=options, action="rotate_secrets", check_mode=check_mode, async_val=0, environment=[], diff=False)
    loader = SimpleNamespace(_vault=VaultLib())
    return rotate_secrets.ActionModule(task, mock.Mock(), mock.Mock(), loader, mock.Mock(), mock.Mock()).run(task_vars=task_vars)


@pytest.fixture
def action(tmp_path):
    """Runs the action on a file with two secrets, for a host with the variables; returns its result."""
    file = tmp_path / "group_vars/all/91-secrets.yml"
    file.parent.mkdir(parents=True)
    values = {"secret_django_key": f"{MARK}one", "secret_app_api_key": f"{MARK}two"}
    file.write_text(yaml.safe_dump(values, sort_keys=False))

    def run(*words, check_mode=False, emergency=False, **variables):
        options = {"path": str(file), "inventory": str(tmp_path), "rotate": list(words), "emergency": emergency}
        options |= {"names": KNOWN, "overlapping": ["secret_django_key"]}
        host = (rotate_secrets.values(file.read_text()) if run.readable else values) | variables
        return run_action(options, {"groups": {"all": ["host1"], "flower": []}, "hostvars": {"host1": host}}, check_mode)

    run.file, run.readable = file, True
    return run


def test_action_writes_new_values_and_describes_the_old_ones(action):
    words = ("secret_django_key", "secret_app_api_key")
    planned = action(*words, check_mode=True)
    assert yaml.safe_load(action.file.read_text()) == {"secret_django_key": f"{MARK}one", "secret_app_api_key": f"{MARK}two"}
    done = action(*words)
    assert planned == done
    assert (done["changed"], done["names"], done["earlier"], done["certificates"]) == (True, list(words), [], False)
    assert [line.split(":")[0] for line in done["stops"]] == ["secret_app_api_key"]
    assert [line.split(":")[0] for line in done["stays"]] == ["secret_django_key"]
    new = yaml.safe_load(action.file.read_text())
    assert (new["secret_django_key_old"], new["secret_app_api_key_old"]) == (f"{MARK}one", f"{MARK}two")
    # A run that somebody killed after it wrote the file.
    again = action(*words)
    assert (again["changed"], again["names"], again["earlier"]) == (False, [], list(words))
    ended = action("finish")
    assert (ended["changed"], ended["names"], ended["stays"]) == (True, ["secret_django_key", "secret_app_api_key"], [])
    assert sorted(yaml.safe_load(action.file.read_text())) == ["secret_app_api_key", "secret_django_key"]


def test_action_keeps_no_old_value_in_an_emergency(action):
    done = action("secret_django_key", emergency=True)
    assert (done["stays"], [line.split(":")[0] for line in done["stops"]]) == ([], ["secret_django_key"])
    assert list(yaml.safe_load(action.file.read_text())) == ["secret_django_key", "secret_app_api_key"]


@pytest.mark.parametrize(
    ("words", "variables", "reason"),
    [
        (["secret_djanga_key"], {}, "rotate has secret_djanga_key; allowed: "),
        (["secret_flower_cookie"], {}, "rotate has secret_flower_cookie, but the inventory has no host in the group flower."),
        (["metrics"], {}, "lacks secret_app_metrics_token."),
        (["django"], {"secret_django_key": f"{MARK}own"}, "host1 has a different secret_django_key than "),
        (["django"], {"app_environment": {"SECRET_KEY": "own"}}, "SECRET_KEY of app_environment replaces secret_django_key"),
    ],
)
def test_action_refuses_and_changes_nothing(action, words, variables, reason):
    before = action.file.read_bytes()
    with pytest.raises(AnsibleActionFail) as caught:
        action(*words, **variables)
    assert reason in str(caught.value)
    assert str(caught.value).endswith(" Nothing was changed.")
    assert action.file.read_bytes() == before


def test_action_refuses_a_secret_that_another_file_sets(action):
    other = action.file.parent / "95-own.yml"
    other.write_text("secret_django_key: own\n")
    (action.file.parent / "94-no-variables.yml").write_bytes(b"\xff")
    with pytest.raises(AnsibleActionFail, match=f"secret_django_key is set in {other}, not by 91-secrets.yml"):
        action("django")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist. create_secrets.yml creates it."),
        (b"a: \xff", "can't be read or written: it is not UTF-8."),
        (b"- a\n", "is not a mapping of names to values."),
    ],
)
def test_action_names_an_unusable_file(action, content, reason):
    action.readable = False
    action.file.unlink()
    if content is not None:
        action.file.write_bytes(content)
    with pytest.raises(AnsibleActionFail) as caught:
        action("django")
    assert str(caught.value) == f"{action.file} {reason} Nothing was changed."


def test_the_action_accepts_the_options_that_its_module_documents():
    documented = yaml.safe_load(documentation.DOCUMENTATION)["options"]
    with (
        mock.patch.object(rotate_secrets.ActionModule, "validate_argument_spec", side_effect=KeyboardInterrupt) as validate,
        pytest.raises(KeyboardInterrupt),
    ):
        run_action({}, {})
    for option in documented.values():
        del option["description"]
    assert validate.call_args.args == (documented,)


# The playbook, with a stand-in for site.yml that writes the values that the roles would get


@pytest.fixture
def inventory(tmp_path):
    folder = tmp_path / "inventory"
    common_variables(folder)
    file = folder / "group_vars/all/91-secrets.yml"
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in json.loads(file.read_text()).items()]
    file.write_text("# Kept.\n" + "".join(lines))
    hosts = {"hosts": {"host1.invalid": None}}
    groups = {name: hosts for name in ("broker", "database", "web", "workers", "app")}
    (folder / "hosts.json").write_text(json.dumps({"all": {"children": groups}}))
    (tmp_path / "playbooks/ops").mkdir(parents=True)
    shutil.copy(ROOT / "playbooks/ops/rotate_secrets.yml", tmp_path / "playbooks/ops")
    look = {
        "environment": "{{ django_environment }}",
        "users": "{{ postgresql_users }}",
        "broker": "{{ rabbitmq_users }}",
        "replace": "{{ certificates_replace | default(false) }}",
    }
    write = {
        "copy": {"content": "{{ look | to_json }}", "dest": str(tmp_path / "seen"), "mode": "0600"},
        "delegate_to": "localhost",
        "connection": "local",
        "no_log": True,
    }
    play = {"hosts": "all", "gather_facts": False, "vars": {"look": look}, "tasks": [write]}
    (tmp_path / "playbooks/site.yml").write_text(json.dumps([play]))
    return folder


@pytest.fixture
def rotate(inventory):
    def run(*arguments):
        words = [Path(sys.executable).parent / "ansible-playbook", "-i", inventory, "-vvv", "--diff"]
        return subprocess.run(
            [*words, inventory.parent / "playbooks/ops/rotate_secrets.yml", *arguments],
            cwd=ROOT, env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def seen(inventory):
    return json.loads((inventory.parent / "seen").read_text())


def test_playbook_gives_new_values_to_later_plays_and_shows_no_secret(inventory, rotate):
    file, password = inventory / "group_vars/all/91-secrets.yml", inventory.parent / "password"
    plain = file.read_text()
    old = yaml.safe_load(plain)
    file.write_bytes(VaultLib([("default", SECRET)]).encrypt(plain, secret=SECRET))
    password.write_bytes(SECRET.bytes)
    done = rotate("-e", "rotate=all", "--vault-password-file", password)
    assert done.returncode == 0, done.stdout + done.stderr
    text = VaultLib([("default", SECRET)]).decrypt(file.read_bytes()).decode()
    assert text.startswith("# Kept.\n")
    new = yaml.safe_load(text)
    assert {name for name in old if new[name] == old[name]} == {
        "secret_certificate_authority",
        "secret_backups_password",
        "secret_postgresql_archive_password",
        # No host runs Flower, the cache or the monitoring.
        "secret_valkey_password",
        "secret_flower_password",
        "secret_flower_cookie",
        "secret_monitoring_password",
        "secret_postgresql_monitoring_password",
    }
    assert [value for value in {*old.values(), *new.values()} if value in done.stdout + done.stderr] == []
    found = seen(inventory)
    assert found["environment"]["SECRET_KEY"] == new["secret_django_key"]
    assert found["environment"]["SECRET_KEY_FALLBACKS"] == [old["secret_django_key"]]
    assert [user["password"] for user in found["users"]] == [
        old["secret_postgresql_app_password"],
        new["secret_postgresql_app_password"],
    ]
    assert f"//mailroom-next:{new['secret_postgresql_app_password']}@" in found["environment"]["DATABASE_URL"]
    assert found["replace"] is True
    assert "The old values still work: secret_postgresql_app_password: " in done.stdout
    assert "secret_django_key: sessions that the old key signed stay valid" in done.stdout

    # Ansible hides the content of encrypted files by itself, so the second run uses a plain file.
    file.write_text(text)
    done = rotate("-e", "rotate=finish")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [value for value in {*old.values(), *new.values()} if value in done.stdout + done.stderr] == []
    text = file.read_text()
    assert text.startswith("# Kept.\n")
    assert yaml.safe_load(text) == {name: value for name, value in new.items() if not name.endswith("_old")}
    found = seen(inventory)
    assert found["environment"]["SECRET_KEY_FALLBACKS"] == []
    assert {user["password"] for user in found["users"]} == {new["secret_postgresql_app_password"]}
    assert f"//mailroom:{new['secret_postgresql_app_password']}@" in found["environment"]["DATABASE_URL"]
    assert "No old value works." in done.stdout


def refusal(done, inventory, before):
    assert done.returncode != 0
    assert not (inventory.parent / "seen").exists()
    assert (inventory / "group_vars/all/91-secrets.yml").read_bytes() == before
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "rotate is not set; set it to the secrets to rotate, such as -e rotate=all"),
        (["-e", "rotate=all", "--limit", "host1.invalid"], "--limit is set. The hosts of an environment share its secrets"),
        (["-e", "rotate=djanga"], "rotate has djanga; allowed: all, finish,"),
    ],
)
def test_playbook_refuses_before_it_changes_the_file(inventory, rotate, arguments, sentence):
    before = (inventory / "group_vars/all/91-secrets.yml").read_bytes()
    assert sentence in refusal(rotate(*arguments), inventory, before)


@pytest.mark.parametrize("where", ["group_vars/all/95-own.yml", "host_vars/host1.invalid.yml"])
def test_secret_of_another_file_is_refused(inventory, rotate, where):
    other = inventory / where
    other.parent.mkdir(exist_ok=True)
    other.write_text(f"secret_django_key: {MARK}own\n")
    before = (inventory / "group_vars/all/91-secrets.yml").read_bytes()
    text = refusal(rotate("-e", "rotate=django"), inventory, before)
    assert (
        f"secret_django_key is set in {other}, not by 91-secrets.yml: change it there, then run site.yml. Nothing was changed."
        in text
    )


def test_secret_of_the_hosts_file_is_refused(inventory, rotate):
    hosts = json.loads((inventory / "hosts.json").read_text())
    hosts["all"]["children"]["app"]["hosts"]["host1.invalid"] = {"secret_django_key": f"{MARK}own"}
    (inventory / "hosts.json").write_text(json.dumps(hosts))
    before = (inventory / "group_vars/all/91-secrets.yml").read_bytes()
    assert "host1.invalid has a different secret_django_key than" in refusal(rotate("-e", "rotate=django"), inventory, before)


def test_django_key_of_app_environment_is_refused(inventory, rotate):
    (inventory / "group_vars/all/30-own.yml").write_text(f"app_environment: {{SECRET_KEY: {MARK}own}}\n")
    before = (inventory / "group_vars/all/91-secrets.yml").read_bytes()
    assert "SECRET_KEY of app_environment replaces" in refusal(rotate("-e", "rotate=django"), inventory, before)


def test_missing_file_of_secrets_is_refused(inventory, rotate):
    file = inventory / "group_vars/all/91-secrets.yml"
    file.rename(inventory / "group_vars/all/90-own.yml")
    done = rotate("-e", "rotate=django")
    assert done.returncode != 0
    assert f"{file} does not exist. create_secrets.yml creates it. Nothing was changed." in " ".join(done.stdout.split())


def test_check_mode_changes_nothing(inventory, rotate):
    before = (inventory / "group_vars/all/91-secrets.yml").read_bytes()
    done = rotate("-e", "rotate=django", "--check")
    assert done.returncode == 0, done.stdout
    assert (inventory / "group_vars/all/91-secrets.yml").read_bytes() == before
