"""Deploys the projects of docs/own-project.md with the code on that page, one after the other on one host.

Each project gets a copy of inventories/ whose application.yml is the page's example, with the lines of the project's recipe.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import yaml

PROJECT = Path(__file__).resolve().parents[3]
SHAPES = PROJECT / "molecule/projects/shapes"
DOCUMENT = (PROJECT / "docs/own-project.md").read_text()
# The sections of the page that describe a project.
NEW, REQUIREMENTS, COOKIECUTTER = "A new project", "A project with requirements.txt", "cookiecutter-django"
ASGI, PACKAGE = "ASGI, a `src` directory, no manage.py", "A package from an index"
# This section has no separate project. The project with requirements.txt is deployed from git.
GIT = "From a git repository"
# Per section: the directory with its project. None if the section's commands create the project.
PROJECTS = {NEW: None, REQUIREMENTS: "example", COOKIECUTTER: "cookiecutter", ASGI: "src", PACKAGE: None}
# The projects of each scenario. The projects of projects-built need minutes for a compiler, or for many packages.
SCENARIOS = {"projects": (NEW, REQUIREMENTS, ASGI), "projects-built": (COOKIECUTTER, PACKAGE)}
HERE = SCENARIOS[Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"]).name]
# The headers that a proxy sends.
HEADERS = {"Host": "localhost", "X-Forwarded-Proto": "https", "Accept-Language": "de"}


def section_text(section):
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    return text


def blocks(section, language):
    """Returns the code blocks of a section of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section_text(section), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """Returns an environment with uv in PATH, from the lock file of the role python_environment."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    lock = PROJECT / "roles/python_environment/files/uv.txt"
    pip = [folder / "bin/pip", "install", "--quiet", "--require-hashes", "--only-binary", ":all:", "--requirement", lock]
    subprocess.run(pip, check=True)
    return {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


class Deployment:
    """A project and its inventory in a temporary folder. `run` deploys it."""

    def __init__(self, folder, section):
        self.folder, self.section = folder, section
        self.project = folder / "shop"
        self.inventory = folder / "clone/inventories/production"
        # Variables that replace the page's examples.
        self.variables = {}

    def create(self, tools):
        """Creates the project with the commands and files from the page."""
        shape = PROJECTS[self.section]
        if shape:
            shutil.copytree(SHAPES / shape, self.project)
        # The last block of the first section runs on the host.
        commands = [block for block in blocks(self.section, "sh") if not block.startswith("sudo ")]
        self.project.mkdir(exist_ok=True)
        where = self.folder if self.section == NEW else self.project
        subprocess.run(["sh", "-euc", "".join(commands)], cwd=where, env=tools, check=True, stdin=subprocess.DEVNULL)
        if self.section == COOKIECUTTER:
            subprocess.run(["uv", "lock", "--quiet"], cwd=self.project, env=tools, check=True)
        for block in blocks(self.section, "python"):
            path, text = re.match(r"(?:# (\S+)\n)?(.*)", block, re.DOTALL).groups()
            if path is None:
                # These lines replace lines of cookiecutter-django. The stand-in already has them.
                settings = (self.project / "config/settings/base.py").read_text()
                assert [line for line in text.splitlines() if line not in settings] == []
                continue
            file = self.project / path
            file.write_text((file.read_text() if path.endswith("settings.py") else "") + text)

        if self.section == REQUIREMENTS:
            self.move_to_git()

    def move_to_git(self):
        """Leaves the project only in a repository, as the tag that the page deploys."""
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        for words in (["init"], ["add", "."], ["commit", "--message=1"], ["tag", self.recipe(GIT)["app_version"]]):
            subprocess.run(["git", *identity, *words], cwd=self.project, check=True, capture_output=True)
        repository = self.project.rename(self.folder / "repository")
        key = self.folder / "deploy_key"
        key.touch()
        self.variables = {"app_repository": str(repository), "app_deploy_key": str(key)}

    def recipe(self, section):
        text, *_ = blocks(section, "yaml")
        return yaml.safe_load(text)

    def write_inventory(self):
        scenario = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"], "inventory")
        common = self.inventory.parent / "common"
        common.mkdir(parents=True)
        (common / "wiring.yml").symlink_to(PROJECT / "inventories/common/wiring.yml")
        (example,) = (block for block in blocks(NEW, "yaml") if "# inventories/common/application.yml" in block)
        if self.section == NEW:
            (common / "application.yml").write_text(example)
        else:
            more = self.recipe(GIT) if self.section == REQUIREMENTS else {}
            (common / "application.yml").write_text(yaml.safe_dump(yaml.safe_load(example) | self.recipe(self.section) | more))
        # The hosts, their addresses and their secrets. The rest of the scenario's inventory describes the project in app/.
        shutil.copytree(scenario, self.inventory)
        variables = self.inventory / "group_vars/all"
        for path, text in re.findall(r"```yaml\n# inventories/ENVIRONMENT/(\S+)\n(.*?)```", section_text(self.section), re.DOTALL):
            (self.inventory / path).write_text(text)
        (variables / "00-common").symlink_to("../../../common")
        (variables / "20-testbed.yml").symlink_to(PROJECT / "testbed/vars.yml")

    def run(self, *arguments):
        words = ["--inventory", self.inventory, "--extra-vars", json.dumps(self.variables), *arguments, PROJECT / "site.yml"]
        environment = {name: value for name, value in os.environ.items() if name != "ANSIBLE_INVENTORY"}
        return subprocess.run(
            [Path(sys.executable).parent / "ansible-playbook", *words],
            env={**environment, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module", params=HERE)
def deployment(request, tmp_path_factory, host, tools):
    """A project that site.yml has deployed. It is removed afterwards, since the next project uses its name and ports."""
    deployment = Deployment(tmp_path_factory.mktemp("projects"), request.param)
    deployment.create(tools)
    deployment.write_inventory()
    if request.param == NEW:
        checked = deployment.run("--check", "--diff")
        assert checked.returncode == 0, checked.stdout + checked.stderr
    done = deployment.run()
    deployment.output = done.stdout + done.stderr
    assert done.returncode == 0, deployment.output
    yield deployment
    with host.sudo():
        host.check_output("systemctl stop shop.target && rm -r /opt/shop /etc/shop /var/lib/shop")
        host.check_output("runuser -u postgres -- dropdb --force shop")


def manage(host, arguments):
    with host.sudo():
        return host.check_output(f"shop-manage {arguments}")


def flower(url, variables, path):
    response = requests.get(f"{url(5555)}{path}", auth=("flower", variables["secret_flower_password"]), timeout=10)
    response.raise_for_status()
    return response.json()


def of_projects(cases):
    """Marks a test with the projects that it tests, and the expected value for each."""

    def mark(test):
        test.cases = cases
        return test

    return mark


@pytest.fixture
def case(request, deployment):
    cases = request.function.cases
    if deployment.section not in cases:
        pytest.skip("This project lacks the part that the test is about.")
    return cases[deployment.section]


# The task, its arguments and its result.
@of_projects(
    {
        NEW: ("shop.tasks", "add", "2, 3", "5"),
        REQUIREMENTS: ("demoapp.tasks", "count_widgets", "", "0"),
        COOKIECUTTER: ("shop.users.tasks", "write_media", "", "5"),
        ASGI: ("orders.tasks", "total", "[2, 3, 4]", "9"),
        PACKAGE: ("pretalx.common.tasks", "task_process_image", "model='Event', pk=0, field='', generate_thumbnail=False", "None"),
    }
)
def test_worker_runs_a_task_and_flower_shows_it(deployment, case, host, url, variables, eventually):
    module, task, arguments, result = case
    code = f"from {module} import {task}; sent = {task}.delay({arguments}); print(sent.get(timeout=30), sent.id, {task}.name)"
    shell = "shell --unsafe-disable-scopes" if deployment.section == PACKAGE else "shell"
    found, number, name = manage(host, f"{shell} --command {shlex.quote(code)}").splitlines()[-1].split()
    assert found == result
    shown = eventually(lambda: flower(url, variables, "/api/tasks").get(number))
    assert (shown["name"], shown["state"]) == (name, "SUCCESS")


@of_projects(
    {
        NEW: ("/admin/login/", "Django administration"),
        REQUIREMENTS: ("/", "0 widgets"),
        COOKIECUTTER: ("/", "Bestellungen"),
        ASGI: ("/", "ASGIRequest"),
        PACKAGE: ("/orga/login/", "pretalx"),
    }
)
def test_web_service_answers(deployment, case, site):
    path, text = case
    response = requests.get(f"{site}{path}", headers=HEADERS, timeout=10)
    assert (response.status_code, text in response.text) == (200, True), response.text


@of_projects({NEW: "/admin/login/", COOKIECUTTER: "/", PACKAGE: "/orga/login/"})
def test_static_files_have_a_hash_in_their_name_and_are_served(deployment, case, site):
    page = requests.get(f"{site}{case}", headers=HEADERS, timeout=10)
    sheet = re.search(r"/static/[^\s\"]+\.[0-9a-f]{12}\.css", page.text)[0]
    response = requests.get(f"{site}{sheet}", headers=HEADERS, timeout=10)
    assert (response.status_code, response.headers["Content-Type"].partition(";")[0]) == (200, "text/css")


@of_projects({REQUIREMENTS: "INSTALLED_APPS of the project lacks django.contrib.staticfiles"})
def test_missing_static_files_are_reported(deployment, case):
    assert f"WARNING: {case}, so no static files were collected." in deployment.output


@of_projects({COOKIECUTTER: "5"})
def test_processes_share_the_cache(deployment, case, host):
    manage(host, f"shell --command \"from django.core.cache import cache; cache.set('key', {case}, 60)\"")
    found = manage(host, "shell --command \"from django.core.cache import cache; print(cache.get('key'))\"")
    assert found.splitlines()[-1] == case


@of_projects({NEW: "5"})
def test_command_of_the_page_runs_on_the_host(deployment, case, host):
    (command,) = (block for block in blocks(deployment.section, "sh") if block.startswith("sudo "))
    assert host.check_output(command.strip()).splitlines()[-1] == case


@of_projects({NEW: "clear-sessions", PACKAGE: "periodic"})
def test_timer_runs_its_command(deployment, case, host):
    with host.sudo():
        assert host.check_output(f"systemctl show --property=ActiveState --value shop-{case}.timer") == "active"
        assert host.check_output(f"systemctl show --property=NextElapseUSecRealtime --value shop-{case}.timer") != ""
        assert host.run(f"systemctl start shop-{case}.service").rc == 0
        shown = host.check_output(f"systemctl show --property=ExecMainStatus,ActiveState --value shop-{case}.service")
    assert sorted(shown.split()) == ["0", "inactive"]


@of_projects({REQUIREMENTS: "changed=0", COOKIECUTTER: "changed=0"})
def test_second_run_changes_nothing(deployment, case):
    done = deployment.run()
    assert (done.returncode, case in done.stdout) == (0, True), done.stdout


def test_every_recipe_of_the_page_is_deployed():
    described = re.findall(r"^## (.*)$", DOCUMENT, re.MULTILINE)
    assert [section for section in described if blocks(section, "(?:yaml|python|sh)")] == [*PROJECTS, GIT]
    assert sorted(section for sections in SCENARIOS.values() for section in sections) == sorted(PROJECTS)
