"""Finds variables that carry a role's prefix and that the role does not know: misspelt ones, which Ansible ignores."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml


def unknown_role_variables(names, role_path):
    """Sentences about the names that begin with the role's name and that its argument_specs do not list.

    `names` are a host's variables, `role_path` is the role's directory. Names of registers and internal values begin with
    two underscores and are not looked at.
    """
    role = Path(role_path).name
    specs = yaml.safe_load((Path(role_path) / "meta" / "argument_specs.yml").read_text(encoding="utf-8"))
    known = set(specs["argument_specs"]["main"]["options"])
    unknown = sorted(name for name in names if name.startswith(f"{role}_") and name not in known)
    sentences = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f", did you mean {near[0]}?" if near else f"; the role has {', '.join(sorted(known))}."
        sentences.append(f"{name} is no variable of the role {role}{hint}")
    return sentences


class FilterModule:
    def filters(self):
        return {"unknown_role_variables": unknown_role_variables}
