"""Static checks of the repository's files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ansible
import pytest
import yaml
from helpers import ROLES, ROOT, load, names_in

# The list includes untracked files, but no ignored files.
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
)
FILES = sorted({ROOT / name for name in LISTED.stdout.split("\0") if name and (ROOT / name).is_file()})


def specs(role):
    return yaml.safe_load((ROOT / f"roles/{role}/meta/argument_specs.yml").read_text())["argument_specs"]


def options(role):
    return specs(role)["main"]["options"]


# Roles

# Roles that only other roles use.
INTERNAL = ("package_repository", "python_environment", "services")


@pytest.mark.parametrize("role", ROLES)
def test_defaults_match_the_specs(role):
    defaults = yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text())
    assert defaults == {name: option["default"] for name, option in options(role).items() if "default" in option}
    without = {name for name, option in options(role).items() if "default" not in option}
    assert without == {name for name, option in options(role).items() if option.get("required")}


@pytest.mark.parametrize("role", ROLES)
def test_variables_have_the_roles_prefix_and_a_description(role):
    def walk(found, path=""):
        for name, option in found.items():
            assert option.get("description"), f"{path}{name} has no description"
            assert option.get("type"), f"{path}{name} has no type"
            walk(option.get("options", {}), f"{path}{name}.")

    walk(options(role))
    assert [name for name in options(role) if not name.startswith((f"{role}_", "host_"))] == []


@pytest.mark.parametrize("role", ROLES)
def test_spec_validates_all_variables_of_the_role(role):
    entry_points = specs(role)
    # An internal role gets its variables from other roles, which validate their own variables.
    if role not in INTERNAL:
        assert "validate" in entry_points
        assert [name for name in entry_points if entry_points[name]["options"] != entry_points["main"]["options"]] == []
        assert [name for name in entry_points if not (ROOT / f"roles/{role}/tasks/{name}.yml").exists()] == []


@pytest.mark.parametrize("role", [role for role in ROLES if role not in INTERNAL])
def test_every_public_variable_is_set_by_a_test(role):
    """If no test sets a variable, the variable may have no effect.

    Scenarios set most variables. The host `alternative` of test_templates.py sets the other variables.
    """
    places = ("molecule", "tests", "inventories", "testbed")
    texts = [file.read_text() for file in FILES if file.parts[len(ROOT.parts)] in places and file.suffix in (".py", ".yml")]
    assert [name for name in options(role) if not any(re.search(rf"\b{name}\b", text) for text in texts)] == []


@pytest.mark.parametrize("role", [role for role in ROLES if role not in INTERNAL or role == "services"])
def test_every_role_has_a_scenario_with_tests(role):
    assert (ROOT / f"molecule/{role}/molecule.yml").exists()
    assert list((ROOT / f"molecule/{role}/tests").glob("test_*.py"))


@pytest.mark.parametrize("role", ROLES)
def test_role_reads_no_variable_of_another(role):
    # A variable that a role passes to an internal role is a key in YAML, and this test ignores keys.
    # Roles share the variables `host_…`. Each role that reads one declares it in its argument specs.
    others = {name for other in ROLES if other != role for name in options(other)} - set(options(role))
    prefixes = tuple(f"__{other}_" for other in ROLES if other != role)
    folder = ROOT / "roles" / role
    found = []
    for file in FILES:
        if not file.is_relative_to(folder) or not {"tasks", "templates", "vars", "defaults"} & set(file.parts):
            continue
        content = file.read_text()
        read = names_in(yaml.safe_load(content) if file.suffix == ".yml" else content)
        found += [f"{file.relative_to(ROOT)}: {name}" for name in read if name in others or name.startswith(prefixes)]
    assert found == []


# Documentation


@pytest.mark.parametrize("role", ROLES)
def test_role_readme_is_up_to_date(role):
    text = (ROOT / f"roles/{role}/README.md").read_text()
    assert text == load("docs/generate_roles.py").readme(ROOT / "roles" / role), "make docs writes it"
    assert [f"## {title}" for title in ("Example", "Check mode", "Idempotence") if f"\n## {title}\n" not in text] == []


@pytest.mark.parametrize("role", ROLES)
def test_role_metadata_is_up_to_date(role):
    text = (ROOT / f"roles/{role}/meta/main.yml").read_text()
    assert text == load("docs/generate_roles.py").meta(ROOT / "roles" / role), "make docs writes it"


@pytest.mark.parametrize("role", ROLES)
def test_readme_example_sets_the_required_variables(role):
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / f"roles/{role}/README.md").read_text(), re.DOTALL)
    (item,) = yaml.safe_load(example)
    entries = {entry["role"].removeprefix("django_celery.stack."): entry for entry in item.get("roles", [])}
    given = set(entries[role] if entries else item["vars"]) - {"role"}
    assert {name for name, option in options(role).items() if option.get("required")} <= given <= set(options(role))


# Collection


def test_collection_dependencies_match_requirements_lock_and_use():
    declared = yaml.safe_load((ROOT / "galaxy.yml").read_text())["dependencies"]
    required = {entry["name"]: entry["version"] for entry in yaml.safe_load((ROOT / "requirements.yml").read_text())["collections"]}
    assert declared == {name: f">={version}" for name, version in required.items()}
    # requirements/controller.txt pins the package ansible, which contains the collections.
    brought = Path(ansible.__file__).parents[1] / "ansible_collections"
    manifests = {name: json.loads((brought / name.replace(".", "/") / "MANIFEST.json").read_text()) for name in required}
    assert required == {name: manifest["collection_info"]["version"] for name, manifest in manifests.items()}
    used = set()
    for file in FILES:
        if file.parts[len(ROOT.parts)] in ("playbooks", "roles", "inventories") or file == ROOT / "ansible.cfg":
            used |= set(re.findall(r"\b((?:ansible|community)\.(?!builtin\b)[a-z]+)\.[a-z_]+\b", file.read_text()))
    assert used - {"ansible.cfg"} == set(required)


def test_versions_of_collection_and_application_are_in_the_changelog():
    version = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] in (version, "Unreleased")


# Inventories


def test_every_inventory_has_the_common_variables():
    folders = [*ROOT.glob("inventories/*/group_vars/all"), ROOT / "molecule/inventory/group_vars/all"]
    assert len(folders) > 3
    for folder in folders:
        link = folder / "00-common"
        assert link.is_symlink(), folder
        assert link.resolve() == ROOT / "inventories/common"
        # Ansible loads the link first, so that the environment's files override its variables.
        assert min(path.name for path in folder.iterdir()) == link.name


SCENARIOS = sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_playbooks_and_tests_of_a_scenario_have_the_same_inventories(scenario):
    config = yaml.safe_load((ROOT / ".config/molecule/config.yml").read_text())
    # Without this variable, Testinfra would use Molecule's inventory and ignore ANSIBLE_INVENTORY.
    assert config["verifier"]["options"]["ansible-inventory"] is False
    shared = config["ansible"]
    own = yaml.safe_load((ROOT / f"molecule/{scenario}/molecule.yml").read_text()).get("ansible", {})
    arguments = own.get("executor", shared["executor"])["args"]["ansible_playbook"]
    inventories = [argument.removeprefix("--inventory=") for argument in arguments if argument != "--diff"]
    assert ",".join(inventories) == {**shared["env"], **own.get("env", {})}["ANSIBLE_INVENTORY"]
    # The last inventory overrides the others, and the testbed writes its variables into it.
    assert inventories[-1] == "${MOLECULE_SCENARIO_DIRECTORY}/inventory"


@pytest.mark.parametrize(("scenario", "brokers"), [("celery", ["el9"]), ("django", []), ("default", ["site1"])])
def test_a_scenario_overrides_the_shared_variables(tmp_path, scenario, brokers):
    """The override also works without ansible.cfg, from another folder, and through the link molecule/default."""
    words = ["-i", ROOT / "molecule/inventory", "-i", ROOT / f"molecule/{scenario}/inventory", "all[-1]"]
    show = ["-m", "ansible.builtin.debug", "-a", "msg={{ [wiring_repository, wiring_brokers, host_platform] }}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    command = [Path(sys.executable).with_name("ansible"), *words, *show]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    platform = "debian13" if scenario == "default" else "el9"
    assert json.loads(done.stdout.partition("=>")[2])["msg"] == [str(ROOT), brokers, platform]


# Secrets


def test_no_private_key_and_no_generated_secret_is_tracked():
    begin = b"-----BEGIN "
    found = []
    for file in FILES:
        content = file.read_bytes()
        if re.search(begin + rb"([A-Z0-9]+ )*PRIVATE KEY", content):
            found.append(file)
        if re.search(r"secrets?\.ya?ml$|\.vault_pass|\.pem$|(^|/)id_[a-z0-9]+$|\.env$", str(file.relative_to(ROOT))):
            # An encrypted file of secrets may be tracked; a task file may mention secrets.
            found += [] if content.startswith(b"$ANSIBLE_VAULT;") or "playbooks" in file.parts else [file]
    assert found == []


# Reasons

EXCUSES = re.compile(r"changed_when: false|ignore_errors:|failed_when: false|# noqa|pytest\.(mark\.)?(skip|xfail)|type: ignore")
# A comment with words, a noqa with a reason, or a skip with a reason.
REASON = re.compile(r"#(?! noqa: [A-Z0-9, ]+$).*\w|noqa: [A-Z0-9, ]+ - \w|(skip|xfail)\w*\([^)]*[\"']\w")


def unexcused(lines):
    """The numbers of lines that suppress a check, but have no reason on the line or in a comment above it."""
    for number, line in enumerate(lines, 1):
        if EXCUSES.search(line):
            above = lines[number - 2].strip() if number > 1 else ""
            if not REASON.search(line) and not (above.startswith("#") and REASON.search(above)):
                yield number


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("changed_when: false\n", [1]),
        ("changed_when: false # It reads.\n", []),
        ("# It reads.\nchanged_when: false\n", []),
        ("ignore_errors: true\nfailed_when: false\n", [1, 2]),
        ("x = 1  # noqa: S105\n", [1]),
        ("x = 1  # noqa: S105 - not a secret\n", []),
        ("pytest.skip()\n", [1]),
        ("pytest.skip('no gpg')\n", []),
        ("@pytest.mark.skipif(x, reason='no gpg')\n", []),
    ],
)
def test_suppressions_without_reasons_are_found(text, faults):
    assert list(unexcused(text.splitlines())) == faults


def test_suppressions_have_reasons():
    found = []
    for file in FILES:
        # The application has its own tests and rules.
        if file.suffix in (".py", ".yml", ".yaml") and file != Path(__file__) and not file.is_relative_to(ROOT / "app"):
            found += [f"{file.relative_to(ROOT)}:{number}" for number in unexcused(file.read_text().splitlines())]
    assert found == []


# Locks

LOCKS = sorted([*ROOT.glob("requirements/*.txt"), *ROOT.glob("app/requirements*.txt"), *ROOT.glob("roles/*/files/*.txt")])


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: str(lock.relative_to(ROOT)))
def test_locks_pin_packages_with_hashes_and_without_an_index(lock):
    text = lock.read_text()
    packages = re.split(r"^(?=[^\s#])", text.replace("\\\n", ""), flags=re.MULTILINE)
    packages = [package for package in packages if package.strip() and not package.startswith("#")]
    assert packages
    assert [package for package in packages if not re.match(r"[\w.\[\],-]+==[^\s;]+", package)] == []
    assert [package for package in packages if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", package)] == []
    assert not re.search(r"https?:|--(extra-)?index-url|--find-links|--trusted-host", text)


# Workflows


@pytest.mark.parametrize("variable, job", [("SCENARIOS", "scenario"), ("SLOW_SCENARIOS", "slow")])
def test_workflow_runs_every_scenario_of_the_makefile(variable, job):
    scenarios = re.search(rf"^{variable} := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs[job]["strategy"]["matrix"]["scenario"] == scenarios


def test_every_scenario_is_in_one_of_both_lists():
    text = (ROOT / "Makefile").read_text()
    listed = re.findall(r"^(?:SLOW_)?SCENARIOS := (.*)$", text, re.MULTILINE)
    # `default` is a link to `site`, and `mac` runs only on a Mac.
    found = {path.parent.name for path in ROOT.glob("molecule/*/molecule.yml")} - {"default", "mac"}
    assert sorted(" ".join(listed).split()) == sorted(found)


def test_workflows_are_valid():
    workflows = sorted([*ROOT.glob(".github/workflows/*.yml"), *ROOT.glob(".github/workflows/*.yaml")])
    if not workflows:
        pytest.skip("There are no workflows yet.")
    tool = Path(sys.executable).parent / "check-jsonschema"
    command = [tool, "--builtin-schema", "vendor.github-workflows", *workflows]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
