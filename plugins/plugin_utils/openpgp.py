"""Reads fingerprints of OpenPGP keys without gpg, so that a signing key is checked before a host trusts it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator

from ansible.errors import AnsibleFilterError

PUBLIC_KEY = 6
ARMOUR = re.compile(r"^-----BEGIN PGP PUBLIC KEY BLOCK-----$(.*?)^-----END PGP PUBLIC KEY BLOCK-----$", re.MULTILINE | re.DOTALL)


def _blocks(text: str) -> Iterator[bytes]:
    """Yield the bytes of each ASCII-armoured block of a text (RFC 9580, section 6)."""
    found = ARMOUR.findall("\n".join(line.strip() for line in text.splitlines()))
    if not found:
        raise AnsibleFilterError("This is not an ASCII-armoured OpenPGP public key.")
    if len(found) != text.count("-----BEGIN"):
        raise AnsibleFilterError("The text contains something other than OpenPGP public keys, or an incomplete key.")
    for block in found:
        # Armour headers end at the first empty line; the checksum line begins with "=".
        body = block.partition("\n\n")[2] or block
        try:
            yield base64.b64decode("".join(line for line in body.split() if not line.startswith("=")), validate=True)
        except binascii.Error as error:
            raise AnsibleFilterError(f"The OpenPGP key's armour is damaged: {error}") from None


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield pairs of tag and body (RFC 9580, section 4.2). Lengths that a key's packets can't have are refused."""
    at = 0
    while at < len(data):
        header = data[at]
        at += 1
        if not header & 0x80:
            raise AnsibleFilterError("The OpenPGP key contains data that is not an OpenPGP packet.")
        if header & 0x40:
            tag, first = header & 0x3F, data[at]
            if first < 192:
                length, at = first, at + 1
            elif first < 224:
                length, at = ((first - 192) << 8) + data[at + 1] + 192, at + 2
            elif first == 255:
                length, at = int.from_bytes(data[at + 1 : at + 5], "big"), at + 5
            else:
                raise AnsibleFilterError("The OpenPGP key contains a packet of partial length.")
        else:
            tag, size = (header >> 2) & 0x0F, 1 << (header & 3)
            if size == 8:
                raise AnsibleFilterError("The OpenPGP key contains a packet of indeterminate length.")
            length, at = int.from_bytes(data[at : at + size], "big"), at + size
        if at + length > len(data):
            raise IndexError
        yield tag, data[at : at + length]
        at += length


def openpgp_fingerprints(text: str) -> list[str]:
    """Return the fingerprints of all primary keys in an armoured text, as 40 upper-case hexadecimal digits.

    A key whose fingerprint can't be read is refused, since the host would trust it unchecked.
    """
    found = []
    try:
        for block in _blocks(text):
            for tag, body in _packets(block):
                if tag == PUBLIC_KEY:
                    if body[0] != 4:
                        raise AnsibleFilterError(f"The OpenPGP key has version {body[0]}; only version 4 is supported.")
                    prefix = b"\x99" + len(body).to_bytes(2, "big")
                    # The standard defines the fingerprint of a version 4 key as its SHA-1.
                    found.append(hashlib.sha1(prefix + body, usedforsecurity=False).hexdigest().upper())
    except IndexError:
        raise AnsibleFilterError("The OpenPGP key is truncated.") from None
    return found
