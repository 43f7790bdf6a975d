"""Compares the roles' sources, repositories, keys and Python of each platform with the publishers' documentation."""

from __future__ import annotations

import configparser
import json

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.django_celery.stack.plugins.filter.platform import platform_ca_bundle, platform_family, platform_python
from helpers import ROOT, playbook


def facts(distribution, version, family, release=""):
    return {
        "distribution": distribution,
        "distribution_version": version,
        "distribution_major_version": version.split(".")[0],
        "distribution_release": release,
        "os_family": family,
    }


HOSTS = {
    "debian13": facts("Debian", "13.1", "Debian", "trixie"),
    "ubuntu2404": facts("Ubuntu", "24.04", "Debian", "noble"),
    "ubuntu2604": facts("Ubuntu", "26.04", "Debian", "resolute"),
    "el9": facts("Rocky", "9.6", "RedHat"),
    "el10": facts("AlmaLinux", "10.0", "RedHat"),
}

# From RabbitMQ's pages "Installing on RPM-based Linux" and "Installing on Debian and Ubuntu"; fingerprints in gpg's format.
RELEASE_KEY = "0A9AF2115F4687BD29803A206B73A36E6026DFCA"
ERLANG_KEY = "A16A42516F6A691BC1FF5621E495BB49CC4BBE5B"
SIGNING_KEYS = "https://github.com/rabbitmq/signing-keys/releases/download/3.0/"
EXPRESSIONS = (
    "__erlang_source",
    "__erlang_keys",
    "__rabbitmq_source",
    "__rabbitmq_keys",
    "__django_python",
    "__flower_python",
    "__python_environment_interpreter",
    "__python_environment_packages",
)


def repository_variables(role, family):
    """The variables that a role passes to the role package_repository."""

    def tasks_in(tasks):
        for task in tasks:
            yield task
            yield from tasks_in(task.get("block", []))

    tasks = yaml.safe_load((ROOT / f"roles/{role}/tasks/install-{family}.yml").read_text())
    (variables,) = [task["vars"] for task in tasks_in(tasks) if "ansible.builtin.include_role" in task]
    return variables


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """The values of each host, and the host's repositories: yum's files and apt's addresses."""
    folder = tmp_path_factory.mktemp("platforms")
    defaults = {}
    for role in ("erlang", "rabbitmq", "django", "flower", "python_environment"):
        defaults |= yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text())
    hosts = {name: {"known": found, "rabbitmq_version": "4.2"} for name, found in HOSTS.items()}
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": defaults}}))
    # The play sets these values as facts, which the inventory can't contain.
    tasks = [{"set_fact": {name: f"{{{{ known.{name} }}}}" for name in HOSTS["el9"]} | {"cacheable": True}}]
    family = "{{ ansible_facts | django_celery.stack.platform_family }}"
    for role in ("erlang", "rabbitmq", "python_environment"):
        tasks.append({"include_vars": f"{ROOT}/roles/{role}/vars/{family}.yml"})
    for role in ("django", "flower", "python_environment"):
        tasks.append({"include_vars": f"{ROOT}/roles/{role}/vars/main.yml"})
    shown = {name: f"{{{{ {name} }}}}" for name in EXPRESSIONS}
    tasks.append({"debug": {"msg": shown}})
    repository = ROOT / "roles/package_repository"
    internal = yaml.safe_load((repository / "vars/main.yml").read_text())
    (apt,) = [
        task
        for task in yaml.safe_load((repository / "tasks/repository-Debian.yml").read_text())
        if "ansible.builtin.deb822_repository" in task
    ]
    template = f"{{{{ lookup('template', '{repository}/templates/yum.repo.j2') }}}}"
    addresses = apt["ansible.builtin.deb822_repository"]["uris"]
    for role in ("erlang", "rabbitmq"):
        for family, message in (("RedHat", template), ("Debian", addresses)):
            variables = {**internal, **apt["vars"], **repository_variables(role, family)}
            when = f"ansible_facts['os_family'] == '{family}'"
            tasks.append({"debug": {"msg": message}, "vars": variables, "when": when})
    play = {"hosts": "all", "gather_facts": False, "tasks": tasks}
    (folder / "play.json").write_text(json.dumps([play]))
    code, answer, output = playbook("-i", folder, folder / "play.json")
    assert code == 0, output
    found = {}
    for name in HOSTS:
        said = [task["hosts"][name]["msg"] for task in answer["plays"][0]["tasks"] if "msg" in task["hosts"].get(name, {})]
        found[name] = {**said[0], "repositories": [text for text in said[1:] if text != "Conditional result was False"]}
    return found


def yum(values, host):
    """The sections of a host's repository files, by name."""
    parsed = configparser.ConfigParser(interpolation=None)
    for text in values[host]["repositories"]:
        parsed.read_string(text)
    return {name: dict(parsed[name]) for name in parsed.sections()}


@pytest.mark.parametrize("host", ["el9", "el10"])
def test_yum_sections_match_team_rabbitmqs_documentation(values, host):
    """EL 10 uses el/9, because el/10 does not exist."""
    found = yum(values, host)
    assert {name: section["baseurl"].split() for name, section in found.items()} == {
        "modern-erlang": [f"https://yum{n}.rabbitmq.com/erlang/el/9/$basearch" for n in (1, 2)],
        "modern-erlang-noarch": [f"https://yum{n}.rabbitmq.com/erlang/el/9/noarch" for n in (1, 2)],
        "rabbitmq-el9": [f"https://yum{n}.rabbitmq.com/rabbitmq/el/9/$basearch" for n in (2, 1)],
        "rabbitmq-el9-noarch": [f"https://yum{n}.rabbitmq.com/rabbitmq/el/9/noarch" for n in (2, 1)],
    }
    for section in found.values():
        assert (section["gpgcheck"], section["repo_gpgcheck"], section["sslverify"]) == ("1", "1", "1")
        # The published path, /etc/pki/tls/certs/ca-bundle.crt, is a link to this file.
        assert section["sslcacert"] == "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"
        assert all(key.startswith("file:///etc/pki/rpm-gpg/RPM-GPG-KEY-") for key in section["gpgkey"].split())


def test_yum_sections_include_only_the_pinned_series(values):
    found = yum(values, "el9")
    assert found["modern-erlang"]["includepkgs"] == "erlang-27,erlang-27.*"
    assert found["rabbitmq-el9-noarch"]["includepkgs"] == "rabbitmq-server-4.2.*"
    assert {section["priority"] for section in found.values()} == {"10"}


def test_keys_are_the_published_ones(values):
    assert [(key["key"], key["fingerprint"]) for key in values["el9"]["__erlang_keys"]] == [
        (f"{SIGNING_KEYS}cloudsmith.rabbitmq-erlang.{ERLANG_KEY[-16:]}.key", ERLANG_KEY),
        (f"{SIGNING_KEYS}rabbitmq-release-signing-key.asc", RELEASE_KEY),
    ]
    assert [key["fingerprint"] for key in values["el10"]["__rabbitmq_keys"]] == [RELEASE_KEY]
    for host in ("debian13", "ubuntu2404"):
        for role in ("erlang", "rabbitmq"):
            (key,) = values[host][f"__{role}_keys"]
            assert key == {"key": f"https://keys.openpgp.org/vks/v1/by-fingerprint/{RELEASE_KEY}", "fingerprint": RELEASE_KEY}
    assert yum(values, "el9")["modern-erlang"]["gpgkey"].split() == [
        f"file:///etc/pki/rpm-gpg/RPM-GPG-KEY-{key}" for key in (ERLANG_KEY, RELEASE_KEY)
    ]


def test_apt_addresses_match_team_rabbitmqs_documentation(values):
    assert values["ubuntu2404"]["repositories"] == [
        [f"https://deb{n}.rabbitmq.com/{name}/ubuntu/noble" for n in (1, 2)] for name in ("rabbitmq-erlang", "rabbitmq-server")
    ]
    assert values["debian13"]["repositories"][1][0] == "https://deb1.rabbitmq.com/rabbitmq-server/debian/trixie"


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("debian13", "distribution"),
        ("ubuntu2404", "team_rabbitmq"),
        ("ubuntu2604", "distribution"),
        ("el9", "team_rabbitmq"),
        ("el10", "team_rabbitmq"),
    ],
)
def test_default_source_depends_on_the_platform(values, host, source):
    assert (values[host]["__erlang_source"], values[host]["__rabbitmq_source"]) == (source, source)


@pytest.mark.parametrize(
    ("host", "python", "package"),
    [
        ("debian13", "python3", "python3-venv"),
        ("ubuntu2404", "python3", "python3-venv"),
        ("el9", "python3.12", "python3.12"),
        ("el10", "python3", "python3"),
    ],
)
def test_python_depends_on_the_platform(values, host, python, package):
    assert values[host]["__django_python"] == python
    assert values[host]["__flower_python"] == python
    assert values[host]["__python_environment_interpreter"] == f"/usr/bin/{python}"
    assert values[host]["__python_environment_packages"] == [package]


# Platforms


@pytest.mark.parametrize(
    ("found", "python"),
    [
        (HOSTS["debian13"], "python3"),
        (HOSTS["el9"], "python3.12"),
        (HOSTS["el10"], "python3"),
        (facts("Debian", "9", "Debian"), "python3"),
        (facts("MacOSX", "26.1", "Darwin"), "python3.13"),
    ],
)
def test_locks_have_packages_for_the_python_of_the_platform(found, python):
    assert platform_python(found) == python


@pytest.mark.parametrize(
    ("found", "path"),
    [
        (HOSTS["debian13"], "/etc/ssl/certs/ca-certificates.crt"),
        (HOSTS["ubuntu2404"], "/etc/ssl/certs/ca-certificates.crt"),
        (HOSTS["el10"], "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"),
        ({"os_family": "Darwin", "architecture": "arm64"}, "/opt/homebrew/etc/ansible-ca-certificates/bundle.pem"),
        ({"os_family": "Darwin", "architecture": "x86_64"}, "/usr/local/etc/ansible-ca-certificates/bundle.pem"),
    ],
)
def test_ca_bundle_is_the_one_of_the_platform(found, path):
    assert platform_ca_bundle(found) == path


@pytest.mark.parametrize("host", HOSTS)
def test_supported_platforms_have_a_family(host):
    assert platform_family(HOSTS[host]) == HOSTS[host]["os_family"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            facts("Debian", "12.9", "Debian"),
            "Debian 12.9 is not supported: its RabbitMQ moves to Debian 13 with playbooks/ops/migrate_rabbitmq.yml.",
        ),
        (facts("Ubuntu", "22.04", "Debian"), "Ubuntu 22.04 is not supported."),
        (facts("Fedora", "43", "RedHat"), "Fedora 43 is not supported."),
        (
            facts("Rocky", "8.10", "RedHat"),
            "Rocky 8.10 is not supported: only Python 3.6 can use its dnf, and Ansible no",
        ),
        (facts("Archlinux", "rolling", "Archlinux"), "Archlinux rolling is not supported."),
    ],
)
def test_unsupported_platforms_are_refused_with_the_list(found, words):
    with pytest.raises(AnsibleFilterError) as caught:
        platform_family(found)
    assert words in str(caught.value)
    assert "CentOS Stream and Oracle Linux 9 and 10, macOS 14, 15, 26 and 27." in str(caught.value)


def test_role_for_one_family_refuses_the_other():
    assert platform_family(HOSTS["debian13"], "Debian") == "Debian"
    with pytest.raises(AnsibleFilterError) as caught:
        platform_family(HOSTS["el9"], "Debian")
    assert str(caught.value).startswith("Rocky 9.6 is not supported. Supported are Debian 13 and testing, Ubuntu 24.04 and 26.04.")
