"""Setup of the unit tests: the path of the collection, settings of Hypothesis, and a shared fixture."""

import os

import pytest
from ansible.plugins.loader import init_plugin_loader
from helpers import ROOT
from hypothesis import settings

init_plugin_loader([str(ROOT / "collections")])
# Tests have no deadline, because Molecule scenarios may run on the machine at the same time.
settings.register_profile("repository", deadline=None, max_examples=60)
settings.load_profile("repository")


@pytest.fixture(params=[0, 0o022, 0o077])
def any_umask(request):
    """Runs a test with several umasks."""
    before = os.umask(request.param)
    yield
    os.umask(before)
