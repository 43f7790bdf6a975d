"""Applies the defaults in a role's argument specs to the entries of a list or mapping.

Ansible validates such entries against the specs, but does not add the defaults to them.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from ansible.errors import AnsibleFilterError
from ansible_collections.django_celery.stack.plugins.filter.role_variables import role_options

ROLES = Path(__file__).resolve().parents[2] / "roles"


@functools.cache
def _options(role):
    """Return the options of a role of this collection, from its meta/argument_specs.yml."""
    try:
        return role_options(ROLES / role)
    except FileNotFoundError:
        raise AnsibleFilterError(f"with_defaults: the collection has no role {role}.") from None


def _complete(value, spec):
    """Return a copy of the value with the options' defaults in every mapping."""
    options = spec.get("options")
    if not options or value is None:
        return value
    if spec["type"] == "list":
        return [_complete(entry, {**spec, "type": spec["elements"]}) for entry in value]
    defaults = {name: copy.deepcopy(option["default"]) for name, option in options.items() if "default" in option}
    # items() also evaluates templates that Ansible has not evaluated yet; {**value} would not.
    return defaults | {name: _complete(entry, options.get(name, {})) for name, entry in value.items()}


def with_defaults(value, role, variable):
    """Return the value of a role's variable, with the defaults of nested options. Unknown keys are kept.

    The role is an argument, because a task of another role may evaluate the expression, and role_path is then that role's path.
    """
    options = _options(role)
    if variable not in options:
        raise AnsibleFilterError(f"with_defaults: the argument specs of the role {role} have no option {variable}.")
    return _complete(value, options[variable])


class FilterModule:
    def filters(self):
        return {"with_defaults": with_defaults}
