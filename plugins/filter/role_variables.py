"""Finds errors in a role's variables: names, missing variables, types and choices.

The check replaces validate_argument_spec, which costs a task per role. That module does not report misspelt names. It accepts the
string '5672' for a number and 'a,b' for a list, and does not convert the variable.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import pass_context

# The C loader needs a tenth of the time.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TYPES: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"),
    "dict": (Mapping, "a mapping"),
    "float": ((int, float), "a number"),
    "int": (int, "a whole number"),
    "list": (Sequence, "a list"),
    # A version such as 4.10 without quotes is the number 4.1.
    "path": (str, "a quoted string"),
    "str": (str, "a quoted string"),
}


def mistyped(name, spec, value):
    """Yield the errors of a value and of the values in it: wrong types and choices, unknown and missing keys."""
    kind = spec.get("type", "str")
    types, wanted = TYPES[kind]
    # In Python, strings are sequences, and True and False are integers.
    disguised = (isinstance(value, str) and types is Sequence) or (isinstance(value, bool) and types is not bool)
    if disguised or not isinstance(value, types):
        # A string instead of a mapping can be the mapping's password.
        hidden = spec.get("no_log") or "dict" in (kind, spec.get("elements")) or isinstance(value, (Mapping, list))
        shown = "not" if hidden else f"{value!r}, not"
        yield f"{name} is {'empty, not' if value is None else shown} {wanted}."
    elif kind == "list":
        # For a list, Ansible's specs give the choices and options of an element.
        element = {**spec, "type": spec.get("elements", "str"), "elements": "str"}
        for number, item in enumerate(value):
            yield from mistyped(f"{name}[{number}]", element, item)
    elif kind == "dict":
        options = spec.get("options") or {}
        if options and (unknown := [str(key) for key in value if key not in options]):
            yield f"{name} has {', '.join(unknown)}; allowed: {', '.join(sorted(options))}."
        for key, option in options.items():
            if key in value:
                yield from mistyped(f"{name}.{key}", option, value[key])
            elif option.get("required"):
                yield f"{name} has no {key}, which is required."
    elif "choices" in spec and value not in spec["choices"]:
        yield f"{name} is {value!r}; allowed: {', '.join(map(str, spec['choices']))}."


def role_options(role_path):
    """Return the argument specs of a role's variables."""
    text = (Path(role_path) / "meta" / "argument_specs.yml").read_text(encoding="utf-8")
    specs = yaml.load(text, Loader=LOADER)  # noqa: S506 - both are safe loaders
    return specs["argument_specs"]["main"]["options"]


def misnamed(name, role, options):
    """Return the error for a variable that begins with a role's name and is not one of the role's options."""
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    hint = f", did you mean {near[0]}?" if near else f"; the role has {', '.join(sorted(options))}."
    return f"{name} is not a variable of the role {role}{hint}"


def missing(options, defined):
    """Return an error for each required option that is not in `defined`."""
    required = [name for name, option in options.items() if option.get("required")]
    return [f"{name} is missing; it is required." for name in required if name not in defined]


@pass_context
def role_variable_errors(context, names, role_path):
    """Return the errors of a role's variables: unknown and missing names, and values that the role's argument specs do not allow.

    `names` are the names of a host's variables. `role_path` is the role's directory. Registered and internal variables begin
    with two underscores and are not checked.
    """
    role = Path(role_path).name
    options = role_options(role_path)
    # A playbook can also pass a required variable to the role. Then the host's variables do not have its name.
    sentences = missing(options, context)
    for name in sorted(name for name in names if name.startswith(f"{role}_") or name in options):
        if name in options:
            sentences += mistyped(name, options[name], context.resolve(name))
        else:
            sentences.append(misnamed(name, role, options))
    return sentences


class FilterModule:
    def filters(self):
        return {"role_variable_errors": role_variable_errors}
