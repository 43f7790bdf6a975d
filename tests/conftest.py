"""What all unit tests need: the collection as Ansible finds it, and settings of Hypothesis."""

from ansible.plugins.loader import init_plugin_loader
from helpers import ROOT
from hypothesis import settings

init_plugin_loader([str(ROOT / "collections")])
# No deadline: the machine may be busy with a scenario of Molecule at the same time.
settings.register_profile("repository", deadline=None, max_examples=60)
settings.load_profile("repository")
