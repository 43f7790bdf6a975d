"""Compares the output of each filter with the program that reads its format, or with the format's documentation."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import tempfile

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible.plugins.loader import filter_loader
from ansible_collections.django_celery.stack.plugins.filter import environment_file, lock_files, rabbitmq, role_variables
from helpers import ROOT, load
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment

# Names


def test_roles_and_playbooks_use_each_filter_by_the_name_that_ansible_finds():
    files = [path for folder in ("roles", "playbooks", "inventories") for path in (ROOT / folder).rglob("*")]
    text = "".join(path.read_text() for path in files if path.suffix in (".yml", ".j2"))
    used = set(re.findall(r"\|\s*(django_celery\.stack\.\w+)", text))
    assert len(used) > 10
    assert [name for name in sorted(used) if filter_loader.get(name) is None] == []
    provided = {f"django_celery.stack.{name}" for path in (ROOT / "plugins/filter").glob("*.py") for name in names_of_filters(path)}
    assert used == provided


def names_of_filters(path):
    return load(str(path.relative_to(ROOT))).FilterModule().filters()


# Variables of roles


def option(kind="str", **more):
    return {"type": kind, **more}


USER = {"name": option(required=True), "tags": option("list", elements="str", choices=["a", "b"])}
OPTIONS = {
    "broker_name": option(required=True),
    "broker_port": option("int"),
    "broker_share": option("float"),
    "broker_on": option("bool"),
    "broker_version": option(),
    "broker_password": option(no_log=True),
    "broker_settings": option("dict"),
    "broker_plugins": option("list", elements="str"),
    "broker_source": option(choices=["package", "folder"]),
    "broker_users": option("list", elements="dict", options=USER),
    "host_lock": option("int"),
}


@pytest.fixture
def faults(tmp_path):
    """Returns the errors in a role's variables."""
    (tmp_path / "broker/meta").mkdir(parents=True)
    specs = {"argument_specs": {"main": {"options": OPTIONS}}}
    (tmp_path / "broker/meta/argument_specs.yml").write_text(yaml.safe_dump(specs))

    def find(**variables):
        context = Environment().from_string("").new_context({"broker_name": "mq", **variables})  # noqa: S701 - the template is empty
        return role_variables.role_variable_errors(context, variables.keys(), str(tmp_path / "broker"))

    return find


def test_valid_internal_and_foreign_variables_are_accepted(faults):
    users = [{"name": "a", "tags": ["b"]}, {"name": "c"}]
    assert faults(broker_port=1, broker_share=1, broker_on=False, broker_version="4.10", broker_users=users) == []
    assert faults(broker_settings={"a": 1}, broker_plugins=[], __broker_prot=1, brokers="", other_prot=1) == []


def test_missing_variable_is_reported_unless_the_playbook_defines_it():
    # new_context has the variables of the playbook too, such as those that it passes to the role.
    context = Environment().from_string("").new_context({"broker_port": 1})  # noqa: S701 - the template is empty
    assert role_variables.missing(OPTIONS, context) == ["broker_name is missing; it is required."]
    assert role_variables.missing(OPTIONS, {"broker_name": ""}) == []


def test_misspelt_variable_is_reported_with_a_suggestion(faults):
    assert faults(broker_prot=1) == ["broker_prot is not a variable of the role broker, did you mean broker_port?"]


def test_without_a_similar_name_all_variables_are_listed(faults):
    (sentence,) = faults(broker_zzzzzzzzzzzzz=1)
    assert sentence == f"broker_zzzzzzzzzzzzz is not a variable of the role broker; the role has {', '.join(sorted(OPTIONS))}."


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("broker_port", "5672", "broker_port is '5672', not a whole number."),
        ("broker_port", True, "broker_port is True, not a whole number."),
        ("broker_port", 1.5, "broker_port is 1.5, not a whole number."),
        ("broker_share", "0.5", "broker_share is '0.5', not a number."),
        ("broker_on", "false", "broker_on is 'false', not true or false."),
        ("broker_on", 1, "broker_on is 1, not true or false."),
        ("broker_version", 4.1, "broker_version is 4.1, not a quoted string."),
        ("broker_settings", [], "broker_settings is not a mapping."),
        ("broker_plugins", "a,b", "broker_plugins is 'a,b', not a list."),
        ("broker_plugins", None, "broker_plugins is empty, not a list."),
        ("broker_plugins", ["a", 1], "broker_plugins[1] is 1, not a quoted string."),
        ("broker_users", ["a"], "broker_users[0] is not a mapping."),
        ("broker_users", [{"name": "a", "tags": "b"}], "broker_users[0].tags is 'b', not a list."),
        ("broker_source", "snap", "broker_source is 'snap'; allowed: package, folder."),
        ("broker_users", [{"name": "a", "tags": ["b", "c"]}], "broker_users[0].tags[1] is 'c'; allowed: a, b."),
        ("broker_users", [{"name": "a", "more": 1}], "broker_users[0] has more; allowed: name, tags."),
        ("broker_users", [{"tags": []}], "broker_users[0] has no name, which is required."),
        ("host_lock", "600", "host_lock is '600', not a whole number."),
        ("broker_password", 123456, "broker_password is not a quoted string."),
    ],
)
def test_value_that_the_specs_do_not_allow_is_shown_unless_it_is_secret(faults, name, value, sentence):
    assert faults(**{name: value}) == [sentence]


# Environment files


NAMES = st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,9}\Z").filter(lambda name: name not in os.environ)
# Values have no control characters, and no surrogates, which UTF-8 can't encode.
PRINTABLE = st.text(st.characters(exclude_categories=["C"]), max_size=20)


@settings(max_examples=40)
@given(st.dictionaries(NAMES.map("x_{}".format), PRINTABLE | st.sampled_from(["'", "''\\'", "$HOME `id` $(id)", "a b  "])))
def test_sh_reads_back_the_values_of_an_environment_file(variables):
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write(environment_file.environment_file(variables))
        file.flush()
        command = ["sh", "-c", 'set -a; . "$1"; env -0', "sh", file.name]
        output = subprocess.run(command, capture_output=True, check=True, env={"PATH": os.environ["PATH"]}).stdout
    read = dict(entry.split("=", 1) for entry in output.decode().split("\0") if "=" in entry)
    assert {name: value for name, value in read.items() if name.startswith("x_")} == variables


def test_environment_files_format_booleans_lists_and_none():
    text = environment_file.environment_file({"B": True, "A": ["x", 1], "C": None, "D": 5})
    assert text == "A='x,1'\nB='true'\nC=''\nD='5'\n"


@pytest.mark.parametrize("variables", [{"1a": ""}, {"a-b": ""}, {"a b": ""}, {"": ""}, {"a\n": ""}, {"a": "x\ny"}, {"a": "\0"}])
def test_environment_files_refuse_unsupported_values(variables):
    with pytest.raises(AnsibleFilterError):
        environment_file.environment_file(variables)


def test_errors_of_an_environment_name_the_variable():
    variables = {"JSON": {"a": 1}, "LISTS": [["a"]], "KEY": "Secret\nline", "RIGHT": ["a", 1, True], "a-b": ""}
    assert environment_file.environment_errors(variables) == [
        "JSON is a mapping or a nested list. For JSON, use to_json.",
        "The value of the environment variable KEY contains a line break or a NUL byte.",
        "LISTS is a mapping or a nested list. For JSON, use to_json.",
        "'a-b' is not a valid name of an environment variable.",
    ]


def test_refused_value_is_not_shown():
    with pytest.raises(AnsibleFilterError) as caught:
        environment_file.environment_file({"KEY": "Secret\nline"})
    assert "KEY" in str(caught.value)
    assert "Secret" not in str(caught.value)


# RabbitMQ


@given(st.text(), st.text())
def test_password_hashes_follow_rabbitmqs_documentation(password, salt_of):
    made = base64.b64decode(rabbitmq.rabbitmq_password_hash(password, salt_of))
    salt, digest = made[:4], made[4:]
    assert digest == hashlib.sha256(salt + password.encode()).digest()
    assert rabbitmq.rabbitmq_password_hash(password, salt_of) == rabbitmq.rabbitmq_password_hash(password, salt_of)


def test_salt_depends_on_its_secret():
    assert rabbitmq.rabbitmq_password_hash("a", "one") != rabbitmq.rabbitmq_password_hash("a", "two")


TABLE = yaml.safe_load((ROOT / "roles/rabbitmq/vars/main/compatibility.yml").read_text())["__rabbitmq_compatibility"]


@pytest.mark.parametrize(
    ("version", "erlang", "level"),
    [
        ("4.3", "27", "supported"),
        ("4.3.1", "27.3.4", "supported"),
        ("4.3.2", "26.2", "supported"),
        ("4.3.3", "26.2", "refused"),
        ("4.3.2", "29", "refused"),
        ("4.3", "26.2", "refused"),
        ("4.3", "28", "paired"),
        ("4.3", "29", "paired"),
        ("4.2.10", "26.2.5", "refused"),
        ("4.2.9", "27", "supported"),
        ("4.2.8", "26.2.5", "supported"),
        ("4.0.3", "26.2", "supported"),
        ("4.0.3", "27", "refused"),
        ("4.0.0", "26.2", "unknown"),
        ("4.x", "27", "unknown"),
        ("4.2", "26.1", "refused"),
        ("4.0", "27", "supported"),
        ("4.0", "28", "refused"),
        ("4.0", "29", "refused"),
        ("4.0", "2", "refused"),
        ("3.13", "26.2", "unknown"),
        ("4.30", "27", "unknown"),
        ("5.0", "29", "unknown"),
    ],
)
def test_included_table_of_rabbitmq_and_erlang(version, erlang, level):
    assert rabbitmq.compatibility(TABLE, version, erlang) == level


# Celery

LOCK = """\
celery-types==1.0 \\
    --hash=sha256:aa
    # via celery==9.9
celery[redis,sqs]==5.7.0 ; python_version >= "3.11" \\
    --hash=sha256:bb
Django==5.2.8 --hash=sha256:cc
"""


@pytest.mark.parametrize(
    ("package", "version"), [("celery", "5.7.0"), ("django", "5.2.8"), ("celery-types", "1.0"), ("kombu", ""), ("c.lery", "")]
)
def test_versions_of_a_lock(package, version):
    assert lock_files.locked_version(LOCK, package) == version


# The formats of uv.lock and pylock.toml. The hosts of their URLs don't exist.
UV_LOCK = """version = 1
requires-python = ">=3.12"

[[package]]
name = "shop"
version = "1.0"
source = { virtual = "." }
dependencies = [{ name = "celery" }, { name = "uvicorn-worker" }]

[[package]]
name = "celery"
version = "5.7.0"
source = { registry = "https://index.invalid/simple" }
wheels = [{ url = "https://index.invalid/celery-5.7.0-py3-none-any.whl", hash = "sha256:aa", size = 1 }]
"""
PYLOCK = """lock-version = "1.0"
created-by = "uv"

[[packages]]
name = "celery"
version = "5.7.0"
index = "https://index.invalid/simple"
sdist = { url = "https://index.invalid/celery-5.7.0.tar.gz", hashes = { sha256 = "bb" } }
wheels = [{ url = "https://index.invalid/celery-5.7.0-py3-none-any.whl", hashes = { sha256 = "aa" } }]

[[packages]]
name = "tzdata"
version = "2026.1"
marker = "sys_platform == 'win32'"
wheels = [{ url = "https://index.invalid/tzdata-2026.1-py2.py3-none-any.whl", hashes = { sha256 = "cc" } }]
"""
FROM_GIT = """
[[packages]]
name = "fork"
vcs = { type = "git", url = "https://git.invalid/fork", commit-id = "0123456789" }
"""


@pytest.mark.parametrize("lock", [UV_LOCK, PYLOCK], ids=["uv.lock", "pylock.toml"])
def test_versions_of_a_toml_lock(lock):
    assert lock_files.locked_version(lock, "celery") == "5.7.0"
    assert lock_files.locked_version(lock, "kombu") == ""
    assert lock_files.packages_without_hashes(lock) == []
    assert lock_files.has_packages(lock)


def test_names_of_packages_are_normalized():
    assert lock_files.locked_version("uvicorn_worker==0.4.0 --hash=sha256:aa\n", "uvicorn-worker") == "0.4.0"


def test_pylock_becomes_requirements_without_urls():
    assert lock_files.pylock_requirements(PYLOCK) == (
        "celery==5.7.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
        "tzdata==2026.1 ; sys_platform == 'win32' \\\n    --hash=sha256:cc\n"
    )
    with pytest.raises(AnsibleFilterError, match=r"tzdata in pylock\.toml depends on an extra or a group"):
        lock_files.pylock_requirements(PYLOCK.replace("sys_platform == 'win32'", "'dev' in dependency_groups"))


@pytest.mark.parametrize(
    ("lock", "names"),
    [
        (LOCK, []),
        (LOCK + "kombu==5.7.0\n", ["kombu==5.7.0"]),
        ("# celery==5.7.0\n-r base.txt\n--index-url https://index.invalid\n", []),
        ("-e ./fork\nshop @ git+https://git.invalid/shop ; python_version > '3'\n", ["./fork", "shop"]),
        (PYLOCK + FROM_GIT, ["fork"]),
    ],
    ids=["hashes", "one without", "options", "paths", "pylock from git"],
)
def test_packages_without_hashes_are_named(lock, names):
    assert lock_files.packages_without_hashes(lock) == names


@pytest.mark.parametrize(("lock", "packages"), [(LOCK, True), ("", False), ("# nothing\n--index-url x\n", False)])
def test_lock_without_packages_is_found(lock, packages):
    assert lock_files.has_packages(lock) is packages


def test_version_in_the_applications_lock():
    assert lock_files.locked_version((ROOT / "app/requirements.txt").read_text(), "celery").startswith("5.")
