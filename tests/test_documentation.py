"""Checks that the links, commands, paths and variables in the documentation exist."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from helpers import ROLES, ROOT
from test_repository import FILES, specs

PAGES = [file for file in FILES if file.suffix == ".md" and not file.is_symlink()]
# A changelog may name files and variables that no longer exist.
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]


def name(page):
    return str(page.relative_to(ROOT))


def without_code(text):
    return re.sub(r"^( *)```.*?^\1```|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)


def code(text):
    """Yield the blocks of code and the code in lines of text."""
    blocks = re.compile(r"^( *)```\w*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
    yield from (found[2] for found in blocks.finditer(text))
    yield from re.findall(r"`([^`\n]+)`", blocks.sub("", text))


def anchors(page):
    """The anchors that GitHub and MkDocs give to the headings of a page."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles]


def missing_links(page, text):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


# Other directories of inventories/ are examples, and meta/ is a directory of each role too.
FOLDERS = "app bench docs inventories/common molecule playbooks plugins requirements roles scripts testbed tests".replace(" ", "|")


def missing_paths(text):
    for piece in code(text):
        for path in re.findall(rf"(?:^|(?<=[\s='\"]))(?:(?:{FOLDERS})/[\w./*<>-]*)", piece):
            if not list(ROOT.glob(re.sub(r"<\w+>", "*", path).rstrip("/."))):
                yield path


TARGETS = set(re.findall(r"^([\w-]+(?: [\w-]+)*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
TARGETS = {target for line in TARGETS for target in line.split()}
SCENARIOS = {path.parent.name for path in ROOT.glob("molecule/*/molecule.yml")}


def unknown_targets(text):
    for piece in code(text):
        for target in re.findall(r"(?:^|[;&|(]\s*)make (?:-\w+ )*([a-z][\w-]*)", piece, re.MULTILINE):
            if target not in TARGETS and target.removeprefix("molecule-") not in SCENARIOS:
                yield target


def options(tree):
    for option, spec in tree.items():
        yield option
        yield from options(spec.get("options", {}))


# The code in which a name of a variable can be declared: everything except documentation and tests.
SOURCES = [
    file
    for file in FILES
    if file.suffix in (".yml", ".py", ".j2", "")
    and name(file).partition("/")[0] not in ("tests", "molecule", "docs", "bench", ".github")
]
DECLARED = {word for file in SOURCES for word in re.findall(r"\w+", file.read_text(errors="replace"))}
DECLARED_IN_ROLES = {option for role in ROLES for option in options(specs(role)["main"]["options"])}
VARIABLE = re.compile(rf"(?:{'|'.join([*ROLES, 'app', 'wiring', 'secret', 'host', 'smoke', 'testbed'])})_[a-z0-9_]*[a-z0-9]")
# Variables that an example defines.
EXAMPLES = {
    "app_deploy_key",
    "app_repository",
    "app_version",
    "secret_broker_password",
    "secret_database_password",
    "secret_s3_key",
}
EXAMPLES |= {"secret_shop_broker_password", "secret_shop_database_password", "secret_shop_flower_password"}


def unknown_variables(text):
    for piece in code(text):
        for word in re.findall(r"(?<![\w./-])[a-z]\w+(?![\w./(])", piece):
            if VARIABLE.fullmatch(word) and word not in DECLARED | DECLARED_IN_ROLES | EXAMPLES:
                yield word


def unknown_playbook_variables(text):
    """Yield each `-e name=` whose name is not in the playbook of the same command."""
    for piece in code(text):
        for command in re.sub(r"\\\n", " ", piece).splitlines():
            playbooks = re.findall(r"playbooks/[\w/]+\.yml", command)
            text = "".join((ROOT / path).read_text() for path in playbooks)
            for word in re.findall(r"-e (\w+)=", command) if playbooks else ():
                if not re.search(rf"\b{word}\b", text) and word not in DECLARED_IN_ROLES:
                    yield f"{word} of {playbooks}"


# Each case shows that a check finds a mistake.
@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (missing_paths, "`playbooks/ops/drain.yml`, `roles/*/README.md`", "`ansible-playbook playbooks/ops/drian.yml`"),
        (unknown_targets, "`make -s sandbox-info`, `make molecule-rabbitmq`", "```\nmake sandbx\n```\n"),
        (unknown_variables, "`rabbitmq_nodes`, rabbitmq_nods", "```yaml\nrabbitmq_nods: []\n```\n"),
        (unknown_playbook_variables, "`ansible-playbook playbooks/ops/drain.yml -e host=a`", "`playbooks/ops/drain.yml -e hots=a`"),
        (
            lambda text: missing_links(ROOT / "README.md", text),
            "[a](docs/operations.md#status), [b](https://example.org/x), `[c](c.md)`",
            "[a](docs/operations.md#statsu)",
        ),
    ],
)
def test_mistakes_are_found(check, right, wrong):
    assert list(check(right)) == []
    assert len(list(check(wrong))) == 1


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_exist(page):
    assert list(missing_links(page, page.read_text())) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_anchors_are_unique(page):
    found = anchors(page)
    assert [anchor for anchor in found if found.count(anchor) > 1] == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
@pytest.mark.parametrize("check", [missing_paths, unknown_targets, unknown_playbook_variables])
def test_commands_and_paths_exist(check, page):
    assert sorted(set(check(page.read_text()))) == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_variables_exist(page):
    text = page.read_text()
    if page.name == "from-other-rabbitmq-roles.md":
        # The other columns have variables of other roles.
        text = "\n".join(re.findall(r"\|([^|\n]*)\|$", text, re.MULTILINE))
    assert sorted(set(unknown_variables(text))) == []


@pytest.mark.parametrize("playbook", sorted(path.name for path in ROOT.glob("playbooks/ops/*.yml")))
def test_every_playbook_for_operations_is_documented(playbook):
    # `make status` and `make offline-packages` run a playbook.
    places = [*ROOT.glob("docs/*.md"), ROOT / "Makefile", *ROOT.glob("scripts/*.py")]
    assert [place for place in places if f"playbooks/ops/{playbook}" in place.read_text()]
