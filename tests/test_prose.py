"""The prose of the repository is plain English: expressions to avoid, each with better wording.

This test checks Markdown, comments and docstrings in Python, and descriptions, task names, messages and comments in the YAML of
roles, playbooks and inventories. `python tests/test_prose.py` prints all matches, and the files for NOT_YET_HELD.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = "Ansible|Celery|Debian|Django|dnf|firewalld|Homebrew|launchd|Molecule|Podman|PostgreSQL|RabbitMQ|Red Hat|systemd|Ubuntu"
COUNTED = "attempts|connections|deliveries|emails|files|hosts|lines|messages|processes|recipients|requests|rows|statements|tasks"
UNITS = "connection|day|delivery|email|host|hour|layer|message|minute|process|request|role|second|task|user|worker"

# A space in a pattern also matches a line break. Case does not matter.
AVOID = [
    # Words in an unusual meaning.
    (r"(?<!left\s)(?<!leave\s)(?<!leaves\s)\balone\b", "only"),
    (r"\banew\b", "again, or create, load, restart …"),
    (r"\bonce more\b", "again"),
    (r"\bof (its|their|his|her|our|your) own\b", "its own …, or separate"),
    (r"\bof (ours|theirs|yours|mine)\b", "our …, or name the owner"),
    (rf"\b({PROGRAMS})'s own\b", "drop 'own', or built-in"),
    (r"\b(make|makes|made|making) (it|them|these|those|what [^.]{1,60}) so\b", "configure, or manage"),
    (r"\bbare\b(?! metal)", "empty, new, or not installed yet"),
    (r"\bshall\b", "must, or will"),
    (r"\bwants\b", "requires, or needs"),
    (r"\basks for\b", "requires, or requests"),
    (r"\bparticular to\b", "specific to"),
    (r"\bwhat is (common|listed|particular|special|there)\b", "name the thing"),
    (r"\b(that|those|this) which\b", "name the thing"),
    (r"\b(has|have|had|must|to) be there\b", "must exist, or create"),
    (r"\b(is|are|was|were) (already )?there(?=[.,;:)])", "exists"),
    (r"\bstands? (before|beside|in|on|there|where)\b", "is in, or is next to"),
    (r"\blies? (below|beside|beneath|in|where)\b", "is in"),
    (r"\b(called|calls it|calls them) after\b", "named after"),
    (r"\bgo(es)? on\b", "continue"),
    (r"\bgives? back\b", "return, or requeue"),
    (r"\bputs? right\b", "repair"),
    (r"\b(mend|mends|mended)\b", "repair, or correct"),
    (r"\bin (the|its|their) place of\b", "instead of"),
    (r"\btakes? (the|its|their) place\b", "replace"),
    (r"\bbut for\b", "except"),
    (r"\ball but\b", "all except"),
    (r"\bas yet\b", "yet"),
    (r"\band kin\b", "and similar …"),
    (r"\bends TLS\b", "terminates TLS"),
    (r"\bturn(s|ed)? over\b", "rotate (a log), or change"),
    (r"\bin a (line|sentence)\b", "in one line, or with an error message"),
    (r"\bin hand\b", "current"),
    (r"\bfor good\b", "permanently"),
    (r"\b(the|that|this) very\b(?! (first|last|same)\b)", "drop it"),
    (r"\bpresent (code|databases|files|ones?|releases?|state|version)\b", "current"),
    (r"\bjudge(s|d)?\b", "check"),
    (r"\bdr(aws|awn|ew) in\b", "depend on, or install"),
    (r"\bhand(s|ed)? (her|him|it|them|what)\b", "pass"),
    (r"\bthrow(s|n)? away\b", "delete"),
    (r"\bof whatever\b", "any"),
    (r"\b(brings|has|have|knows|makes|reads|takes) none\b(?! of)", "has no …, or does not …"),
    (r"\b(till|ought)\b", "until, or should"),
    (r"\b(a|one|each|every) look\b", "query, or check"),
    (r"\blook at the host\b", "inspect the host"),
    (r"\bon paper\b", "not run, or not tested"),
    (r"\bwithout a word\b", "silently"),
    (r"\bwhoever\b", "everyone who, or name them"),
    (r"\bwhom\b", "who, or make it the subject"),
    (r"\bof which\b", "start another sentence"),
    (r"\bupon\b", "on"),
    (r"\b(hereby|herein|thereby|therein|thereof|whereby|wherein|whence|whither)\b", "start another sentence"),
    (r"\b(a|an) \w+ each\b", "one … per …"),
    (rf"\ban? ({UNITS}|scenario|test) of each\b", "one … per …"),
    (r"\ba (host|key|line|package|row|secret|test|value|variable) more\b", "another …"),
    (rf"\b({COUNTED}) an? ({UNITS})\b", "per"),
    (rf"\b(once|twice) an? (?!(day|hour|minute|month|second|week|year)\b)({UNITS})\b", "once per …"),
    (r"\bof (\w+ ){1,3}of (\w+ ){1,3}of\b", "split the chain of 'of'"),
    (r"(^|[.;:] +)One (that|which|who)\b", "repeat the noun"),
    (r"\bwhat (is|was) (already|no longer|not|once)\b(?= \w)", "name the thing"),
    (r"\b(says|tells|warns) of\b", "report, or show"),
    (r"\bof others\b", "of other users, or other users' …"),
    (r"\banother (one|\w+) than\b", "a … that differs from, or a different …"),
    (r"\bin the same line\b", "on the same line"),
    (r"\b(that|which) (do|does) not run(?=\s*[.,;|)])", "is not running"),
    (r"\bneeds? longer\b", "takes longer"),
    (r"\ban empty text\b", "an empty string"),
    (r"\bat the login\b", "at login"),
    (r"\bby (AMQP|FTP|HTTPS?|SFTP|SMTP|SSH|TLS)\b(?!-)", "over"),
    (r"\b(does not stream|standby streams)\b", "is not streaming, or is streaming"),
    (r"\ballowed ((there|(for|on|with) [^;:.]{1,60}) )?(is|are)\b", "allowed: …"),
    # Metaphors.
    (r"\b(doorbell|farewell)s?\b", "notification, or shutdown"),
    (r"\b(feed|feeds|fed|food)\b", "send a watchdog notification"),
    (r"\btired\b", "closed, or expired"),
    (r"\bin vain\b", "without success"),
    (r"\w+s?'s? affairs?\b", "name who acts"),
]
RULES = [(re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), better) for pattern, better in AVOID]


def faults(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the offset of each expression to avoid, the expression, and better wording."""
    for pattern, better in RULES:
        for found in pattern.finditer(text):
            yield found.start(), " ".join(found[0].split()), better


def blank(found: re.Match[str]) -> str:
    """Replace code by characters that no pattern matches, and keep the line numbers."""
    return re.sub(r"[^\n]", "`", found[0])


def markdown(text: str) -> Iterator[tuple[int, str]]:
    text = re.sub(r"^( *)```.*?^\1```", blank, text, flags=re.DOTALL | re.MULTILINE)
    yield 1, re.sub(r"`[^`\n]+`|<!--.*?-->|\]\([^)]*\)|https?://\S+", blank, text, flags=re.DOTALL)


def descriptions(text: str) -> Iterator[tuple[int, str]]:
    """Yield each description in an argument spec, with Ansible's markup for code blanked."""

    def walk(node: yaml.Node) -> Iterator[tuple[int, str]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value in ("description", "short_description") and not isinstance(value, yaml.MappingNode):
                    lines = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    for line in lines:
                        yield line.start_mark.line + 1, re.sub(r"\b[CIV]\(.*?\)", blank, line.value)
                else:
                    yield from walk(value)

    yield from walk(yaml.compose(text, Loader=yaml.SafeLoader))


def task_names(text: str) -> Iterator[tuple[int, str]]:
    """Yield the names of plays, blocks and tasks."""

    def walk(node: yaml.Node) -> Iterator[tuple[int, str]]:
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                if isinstance(entry, yaml.MappingNode):
                    for key, value in entry.value:
                        if key.value == "name":
                            yield value.start_mark.line + 1, re.sub(r"\{\{.*?\}\}", blank, value.value)
                        elif key.value in ("tasks", "pre_tasks", "post_tasks", "handlers", "block", "rescue", "always"):
                            yield from walk(value)

    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if tree is not None:
        yield from walk(tree)


def messages(text: str) -> Iterator[tuple[int, str]]:
    """Yield the messages of tasks and of the rules for variables."""

    def walk(node: yaml.Node) -> Iterator[tuple[int, str]]:
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                yield from walk(entry)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value in ("fail_msg", "msg", "success_msg") and isinstance(value, yaml.ScalarNode):
                    yield value.start_mark.line + 1, re.sub(r"\{\{.*?\}\}|\{%.*?%\}|`[^`]+`", blank, value.value, flags=re.DOTALL)
                else:
                    yield from walk(value)

    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if tree is not None:
        yield from walk(tree)


def blocks(comments: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join comments on consecutive lines, since a sentence may span them."""
    first, last, lines = 0, 0, []
    for number, line in comments:
        if number != last + 1 and lines:
            yield first, "\n".join(lines)
            lines = []
        first = first if lines else number
        last = number
        lines.append(re.sub(r"`[^`]+`", blank, line))
    if lines:
        yield first, "\n".join(lines)


def yaml_comments(text: str) -> Iterator[tuple[int, str]]:
    found = (re.search(r"(?:^|\s)#\s?(.*)", line) for line in text.splitlines())
    yield from blocks([(number, each[1]) for number, each in enumerate(found, 1) if each])


def python(text: str) -> Iterator[tuple[int, str]]:
    comments = [
        (token.start[0], token.string.lstrip("#! "))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    yield from blocks(comments)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            docstring = node.body[0].value
            yield docstring.lineno, re.sub(r"`[^`]+`", blank, docstring.value)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the pieces of prose in a file, each with the number of its first line."""
    text = path.read_text()
    parts = path.relative_to(ROOT).parts
    if path.suffix == ".md":
        yield from markdown(text)
    elif path.suffix == ".py" or (not path.suffix and re.match(r"#!.*\bpython", text)):
        yield from python(text)
    elif path.suffix in (".yml", ".yaml") and parts[0] in ("inventories", "playbooks", "roles", "site.yml"):
        yield from yaml_comments(text)
        yield from messages(text)
        if path.name == "argument_specs.yml":
            yield from descriptions(text)
        elif parts[0] in ("playbooks", "site.yml") or "tasks" in parts:
            yield from task_names(text)


def report(path: Path) -> list[str]:
    lines = [
        f"{path.relative_to(ROOT)}:{line + text.count(chr(10), 0, offset)}: {expression!r}; better: {better}"
        for line, text in prose(path)
        for offset, expression, better in faults(text)
    ]
    # A YAML alias repeats a description.
    return list(dict.fromkeys(lines))


def files() -> list[Path]:
    """List the files that git tracks or could track, without symbolic links."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = sorted({ROOT / name for name in listed.split("\0") if name})
    kinds = ("", ".md", ".py", ".yml", ".yaml")
    return [path for path in paths if path.is_file() and not path.is_symlink() and path.suffix in kinds]


# Files from before these rules. Correct a file, then remove it here.
NOT_YET_HELD: set[str] = set()

FILES = files()


@pytest.mark.parametrize(
    "sentence",
    [
        "Makes what is in a RabbitMQ broker so.",
        "Read what is particular to the family.",
        "A bare host, check mode goes on without it.",
        "Sends 3 once more.",
        "The virtual environment is made\nanew.",
        "A job of ours.",
        "A virtual environment of its own.",
        "On the Red Hat family alone.",
        "It has to be there.",
        "A service each.",
        "The recipients a user may have an hour: 5 recipients an hour.",
        "Its statements are planned once a connection.",
        "Ansible's own check.",
        "It stands in a file.",
        "The user whom Homebrew belongs to.",
        "Other roles hand it what shall run.",
        "A worker feeds the watchdog.",
        "Finds the policies. One that is missing is created.",
        "What is not listed stays.",
        "A node that does not run, or an alarm.",
        "The keys of others, signed by another key than ours.",
    ],
)
def test_the_check_finds_an_expression_to_avoid(sentence):
    assert list(faults(sentence))


@pytest.mark.parametrize(
    "sentence",
    [
        "Unstarted messages are requeued on shutdown.",
        "The role has its own user.",
        "Other databases are left alone.",
        "The stand-in of a Mac.",
        "newsyslog checks the size once an hour.",
        "One file per database.",
        "Are there any hosts?",
        "Erlang 25, on which RabbitMQ 4 does not run.",
        "The document lists what was tested and what was not.",
    ],
)
def test_the_check_accepts_plain_english(sentence):
    assert list(faults(sentence)) == []


@pytest.mark.parametrize(
    ("extract", "text", "line"),
    [
        (markdown, "# Title\n\nMade\nanew.\n", 4),
        (markdown, "```\nmade anew\n```\n\nUse `anew`, or [it](anew.md).\n", None),
        (descriptions, "a:\n  description:\n    - Good.\n    - Made anew.\n", 4),
        (descriptions, "a: {description: C(anew) is an option.}\n", None),
        (task_names, "- name: A play\n  tasks:\n    - name: Make it anew\n", 3),
        (task_names, "- name: A task\n  debug:\n    msg: anew\n", None),
        (messages, "- assert:\n    that: a\n    fail_msg: >-\n      It is made anew.\n", 3),
        (messages, "- debug:\n    msg: '{{ anew }}'\n", None),
        (yaml_comments, "a: 1\n# It is made\n# anew.\n", 3),
        (python, 'def f():\n    """Make it anew."""\n', 2),
        (python, "x = 1  # Made anew.\n", 1),
        (python, "x = 'anew'\n", None),
    ],
)
def test_prose_is_found_with_its_line(extract, text, line):
    found = [first + piece.count("\n", 0, offset) for first, piece in extract(text) for offset, expression, _ in faults(piece)]
    assert found == ([] if line is None else [line])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain_english(path):
    if str(path.relative_to(ROOT)) in NOT_YET_HELD:
        assert report(path), "The file has no expression to avoid: remove it from NOT_YET_HELD."
    else:
        assert report(path) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("roles/*/meta/argument_specs.yml")), ids=lambda path: path.parts[-3])
def test_no_description_ends_at_a_comma(path):
    """In a flow mapping, YAML reads the words after an unquoted comma as another key."""
    keys = {"choices", "default", "description", "elements", "no_log", "options", "required", "type"}

    def unknown(options):
        for name, option in options.items():
            yield from (f"{name}: {key}" for key in set(option) - keys)
            yield from unknown(option.get("options", {}))

    assert list(unknown(yaml.safe_load(path.read_text())["argument_specs"]["main"]["options"])) == []


def test_files_that_are_not_yet_held_exist():
    assert NOT_YET_HELD - {str(path.relative_to(ROOT)) for path in FILES} == set()


if __name__ == "__main__":
    failing = {path: report(path) for path in FILES}
    print("\n".join(line for lines in failing.values() for line in lines), file=sys.stderr)
    print("\n".join(f'    "{path.relative_to(ROOT)}",' for path, lines in failing.items() if lines))
