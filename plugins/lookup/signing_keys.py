"""Reads OpenPGP keys and checks their fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.loader import lookup_loader
from ansible.plugins.lookup import LookupBase
from ansible_collections.django_celery.stack.plugins.plugin_utils.openpgp import openpgp_fingerprints

DOCUMENTATION = r"""
name: signing_keys
short_description: Read OpenPGP keys and check their fingerprints
description:
  - Reads keys on the controller. A key with an unexpected fingerprint never reaches a host.
options:
  _terms:
    description: Mappings of C(key), a URL or a file, and C(fingerprint), 40 hexadecimal digits.
    type: list
    elements: dict
    required: true
  variable:
    description: The variable that lists the keys, for the error message.
    type: str
    required: true
author: The maintainers of this bundle
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ query('django_celery.stack.signing_keys', *erlang_repository_keys, variable='erlang_repository_keys') }}"
"""

RETURN = r"""
_raw: {description: The text of each key., type: list, elements: str}
"""


class LookupModule(LookupBase):
    def run(self, terms: list[dict[str, str]], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        self.set_options(var_options=variables, direct=kwargs)
        return [self.checked(term, variables) for term in terms]

    def checked(self, term: dict[str, str], variables: dict[str, Any] | None) -> str:
        text = self.text(term["key"], variables)
        found = openpgp_fingerprints(text)
        if found != [term["fingerprint"].upper().replace(" ", "")]:
            raise AnsibleLookupError(
                f"The key {term['key']} of {self.get_option('variable')} has the fingerprint {', '.join(found)}, not "
                f"{term['fingerprint']}, which {self.get_option('variable')} lists. Nothing was added to the host."
            )
        return text

    def text(self, key: str, variables: dict[str, Any] | None) -> str:
        if "://" in key:
            lookup = lookup_loader.get("ansible.builtin.url", loader=self._loader, templar=self._templar)
            return str(lookup.run([key], variables, split_lines=False)[0])
        try:
            return Path(key).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise AnsibleLookupError(f"The key {key} of {self.get_option('variable')} can't be read: {error.strerror}.") from None
