"""Settings of Hypothesis for all tests."""

from hypothesis import settings

# No deadline: the machine may be busy with a scenario of Molecule at the same time.
settings.register_profile("repository", deadline=None, max_examples=60)
settings.load_profile("repository")
