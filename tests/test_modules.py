"""Tests all modules: the documentation matches the argument spec, and the examples are valid."""

from __future__ import annotations

from importlib import import_module

import pytest
import yaml
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.module_utils.unlogged import UnloggedModule
from helpers import ROOT

# Action plugins. Their modules contain only the documentation.
ACTIONS = {path.stem for path in (ROOT / "plugins/action").glob("*.py")}
MODULES = sorted({path.stem for path in (ROOT / "plugins/modules").glob("*.py")} - ACTIONS)
KEYS = ("type", "elements", "required", "default")


class Stop(Exception):
    """Stops `main` when the argument spec has been captured."""


@pytest.fixture(params=MODULES)
def module(request):
    return import_module(f"ansible_collections.django_celery.stack.plugins.modules.{request.param}")


def class_of(module):
    """The name of the class that the module instantiates."""
    return "UnloggedModule" if hasattr(module, "UnloggedModule") else "AnsibleModule"


@pytest.fixture
def arguments(module, monkeypatch):
    """The keyword arguments that the module passes to AnsibleModule."""
    seen = {}

    def stop(**words):
        seen.update(words)
        raise Stop

    monkeypatch.setattr(module, class_of(module), stop)
    with pytest.raises(Stop):
        module.main()
    assert seen["supports_check_mode"]
    return seen


@pytest.fixture
def spec(arguments):
    return arguments["argument_spec"]


def nested_secrets(options):
    """Yield the names of secret options that are not at the top level."""
    for option in options.values():
        for name, suboption in (option.get("options") or {}).items():
            if suboption.get("no_log"):
                yield name
        yield from nested_secrets(option.get("options") or {})


def test_module_with_nested_secrets_logs_no_arguments(module, spec):
    assert bool(list(nested_secrets(spec))) == (class_of(module) == "UnloggedModule")


def test_unlogged_module_logs_no_secret(monkeypatch):
    """Ansible searches the log for the text of a nested secret, but the log escapes this text."""
    secret, logged = "MARK'first\nsecond\\", []
    files = {"type": "list", "elements": "dict", "options": {"text": {"type": "str", "no_log": True}}}
    monkeypatch.setattr(AnsibleModule, "log", lambda self, message, log_args=None: logged.append(f"{message} {log_args}"))
    for kind in (AnsibleModule, UnloggedModule):
        with patch_module_args({"files": [{"text": secret}]}):
            kind(argument_spec={"files": files})
    assert ["MARK" in line for line in logged] == [True, False]


def same(options, suboptions):
    """Return the keys that documented options and argument specs have in common."""
    return {
        name: {
            **{key: option[key] for key in KEYS if key in option},
            "options": same(option.get(suboptions) or {}, suboptions),
        }
        for name, option in options.items()
    }


def test_documentation_matches_the_argument_spec(module, spec):
    documented = yaml.safe_load(module.DOCUMENTATION)
    assert documented["module"] == module.__name__.rpartition(".")[2]
    assert same(documented["options"], "suboptions") == same(spec, "options")


def test_examples_are_valid(module, spec):
    name = f"django_celery.stack.{module.__name__.rpartition('.')[2]}"
    tasks = yaml.safe_load(module.EXAMPLES)
    assert tasks
    for task in tasks:
        assert task.keys() == {"name", name}
        assert ArgumentSpecValidator(spec).validate(task[name]).error_messages == []


def test_returned_values_are_described(module):
    for value in yaml.safe_load(module.RETURN).values():
        assert value.keys() >= {"description", "type", "returned"}
