"""Writes each role's README.md from its argument_specs: python docs/generate_roles.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2
import yaml

ROOT = Path(__file__).resolve().parents[1]
BY_HAND = re.compile(r"<!-- By hand -->\n(.*?)\n<!-- End of what is by hand -->", re.DOTALL)


def plain(text: str | list[str]) -> str:
    """Ansible's markup as Markdown, in one line."""
    joined = text if isinstance(text, str) else " ".join(text)
    return re.sub(r"[CI]\((.*?)\)", r"`\1`", " ".join(joined.split())).replace("|", "\\|")


def type_of(option: dict) -> str:
    return f"list of {option['elements']}" if option["type"] == "list" else option["type"]


def default_of(option: dict) -> str:
    if option.get("required"):
        return "**required**"
    if "default" not in option:
        return ""
    value = option["default"]
    # As it is written in YAML: a text is quoted where it would else be something else, such as 4.0; the rest is JSON.
    text = value if isinstance(value, str) and "{" not in value and yaml.safe_load(value) == value else json.dumps(value)
    return f"`{text}`".replace("|", "\\|")


def description_of(option: dict) -> str:
    choices = ", ".join(f"`{choice}`" for choice in option.get("choices", []))
    one = "Each is one of" if option["type"] == "list" else "One of"
    notes = [f"{one} {choices}." if choices else "", "Never shown." if option.get("no_log") else ""]
    return " ".join([plain(option["description"]), *filter(None, notes)])


def tables(options: dict, path: str = ""):
    """Pairs of a path and its options: the role's variables, then each list or mapping with options of its own."""
    yield path, options
    for name, option in options.items():
        if "options" in option:
            yield from tables(option["options"], f"{path}{'.' if path else ''}{name}{'[]' if option['type'] == 'list' else ''}")


def readme(role: Path) -> str:
    """The text of a role's README.md, with what is by hand in the present one."""
    spec = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    file = role / "README.md"
    found = BY_HAND.search(file.read_text()) if file.exists() else None
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 - writes Markdown
    environment.filters.update(plain=plain, type_of=type_of, default_of=default_of, description_of=description_of)
    template = environment.from_string((ROOT / "docs/role.md.j2").read_text())
    return template.render(role=role.name, spec=spec, by_hand=found[1] if found else "", tables=tables).rstrip() + "\n"


if __name__ == "__main__":
    for folder in sorted((ROOT / "roles").iterdir()):
        (folder / "README.md").write_text(readme(folder))
