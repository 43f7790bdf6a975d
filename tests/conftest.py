"""Setup of the unit tests: the path of the collection, and settings of Hypothesis."""

from ansible.plugins.loader import init_plugin_loader
from helpers import ROOT
from hypothesis import settings

init_plugin_loader([str(ROOT / "collections")])
# Tests have no deadline, because Molecule scenarios may run on the machine at the same time.
settings.register_profile("repository", deadline=None, max_examples=60)
settings.load_profile("repository")
