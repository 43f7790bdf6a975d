"""Fingerprints of OpenPGP keys, so that a signing key is checked before a host trusts it. Needs no gpg anywhere."""

from __future__ import annotations

import base64
import binascii
import hashlib

from ansible.errors import AnsibleFilterError

PUBLIC_KEY = 6


def _binary(text):
    """The bytes inside the first ASCII armour of a text (RFC 9580, section 6)."""
    lines = [line.strip() for line in text.splitlines()]
    try:
        begin = lines.index("-----BEGIN PGP PUBLIC KEY BLOCK-----")
        end = lines.index("-----END PGP PUBLIC KEY BLOCK-----", begin)
    except ValueError:
        raise AnsibleFilterError("This is no ASCII-armoured OpenPGP public key.") from None
    body = lines[begin + 1 : end]
    # Armour headers end at the first empty line; the checksum line begins with "=".
    body = body[body.index("") + 1 :] if "" in body else body
    try:
        return base64.b64decode("".join(line for line in body if not line.startswith("=")), validate=True)
    except binascii.Error as error:
        raise AnsibleFilterError(f"The OpenPGP key's armour is damaged: {error}") from None


def _packets(data):
    """Pairs of tag and body (RFC 9580, section 4.2)."""
    at = 0
    while at < len(data):
        header = data[at]
        at += 1
        if header & 0x40:
            tag, first = header & 0x3F, data[at]
            if first < 192:
                length, at = first, at + 1
            elif first < 224:
                length, at = ((first - 192) << 8) + data[at + 1] + 192, at + 2
            else:
                length, at = int.from_bytes(data[at + 1 : at + 5], "big"), at + 5
        else:
            tag, size = (header >> 2) & 0x0F, 1 << (header & 3)
            length, at = int.from_bytes(data[at : at + size], "big"), at + size
        yield tag, data[at : at + length]
        at += length


def openpgp_fingerprints(text):
    """Fingerprints of the primary version 4 keys in an armoured text: upper case hexadecimal, 40 digits each."""
    found = []
    try:
        for tag, body in _packets(_binary(text)):
            if tag == PUBLIC_KEY and body[0] == 4:
                prefix = b"\x99" + len(body).to_bytes(2, "big")
                # The fingerprint of a version 4 key is defined as its SHA-1; it guards nothing else here.
                found.append(hashlib.sha1(prefix + body, usedforsecurity=False).hexdigest().upper())
    except IndexError:
        raise AnsibleFilterError("The OpenPGP key is cut off.") from None
    return found


class FilterModule:
    def filters(self):
        return {"openpgp_fingerprints": openpgp_fingerprints}
