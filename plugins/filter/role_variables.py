"""Finds faults of a role's variables that Ansible passes over: misspelt names, and values of another type than the role's.

validate_argument_spec accepts the text '5672' for a number and 'a,b' for a list, and leaves the variable as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import pass_context

# The one in C takes a tenth of the time.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TYPES: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"),
    "dict": (Mapping, "a mapping"),
    "float": ((int, float), "a number"),
    "int": (int, "a whole number"),
    "list": (Sequence, "a list"),
    # A version such as 4.10 without quotes is the number 4.1.
    "path": (str, "a text in quotes"),
    "str": (str, "a text in quotes"),
}


def mistyped(name, spec, value):
    """Sentences about a value, and what is in it, that is not of its option's type."""
    kind = spec.get("type", "str")
    types, wanted = TYPES[kind]
    # Texts are sequences and truths are whole numbers to Python.
    disguised = (isinstance(value, str) and types is Sequence) or (isinstance(value, bool) and types is not bool)
    if disguised or not isinstance(value, types):
        shown = "not" if spec.get("no_log") or isinstance(value, (Mapping, list)) else f"{value!r}, not"
        yield f"{name} is {'empty, not' if value is None else shown} {wanted}."
    elif kind == "list":
        element = {"type": spec.get("elements", "str"), "options": spec.get("options"), "no_log": spec.get("no_log")}
        for number, item in enumerate(value):
            yield from mistyped(f"{name}[{number}]", element, item)
    elif kind == "dict":
        for key, option in (spec.get("options") or {}).items():
            if key in value:
                yield from mistyped(f"{name}.{key}", option, value[key])


def role_options(role_path):
    """The specification of a role's variables."""
    text = (Path(role_path) / "meta" / "argument_specs.yml").read_text(encoding="utf-8")
    specs = yaml.load(text, Loader=LOADER)  # noqa: S506 - both are safe loaders
    return specs["argument_specs"]["main"]["options"]


def misnamed(name, role, options):
    """The sentence about a variable that begins with a role's name and is not one of its options."""
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    hint = f", did you mean {near[0]}?" if near else f"; the role has {', '.join(sorted(options))}."
    return f"{name} is no variable of the role {role}{hint}"


@pass_context
def role_variable_errors(context, names, role_path):
    """Sentences about the variables that begin with the role's name and that its argument_specs do not have so.

    `names` are those of a host's variables, `role_path` is the role's directory. Names of registers and internal values
    begin with two underscores and are not looked at.
    """
    role = Path(role_path).name
    options = role_options(role_path)
    sentences = []
    for name in sorted(name for name in names if name.startswith(f"{role}_")):
        if name in options:
            sentences += mistyped(name, options[name], context.resolve(name))
        else:
            sentences.append(misnamed(name, role, options))
    return sentences


class FilterModule:
    def filters(self):
        return {"role_variable_errors": role_variable_errors}
