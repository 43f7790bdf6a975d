"""Compares the lookup signing_keys and its fingerprints with RFC 9580 and gpg."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tempfile

import pytest
from ansible.errors import AnsibleError, AnsibleFilterError
from ansible.plugins.loader import lookup_loader
from ansible_collections.django_celery.stack.plugins.plugin_utils.openpgp import openpgp_fingerprints


def packet(body, header="new"):
    """A public key packet with a header of RFC 9580, section 4.2."""
    size = len(body)
    headers = {
        "new": bytes([0xC6, size]) if size < 192 else bytes([0xC6, 0xC0 + ((size - 192) >> 8), (size - 192) & 0xFF]),
        "new, five octets": b"\xc6\xff" + size.to_bytes(4, "big"),
        "old, one octet": b"\x98" + size.to_bytes(1, "big") if size < 256 else b"",
        "old, two octets": b"\x99" + size.to_bytes(2, "big"),
        "old, four octets": b"\x9a" + size.to_bytes(4, "big"),
    }
    return headers[header] + body


def armour(data, headers="Comment: made for a test\n\n", kind="PUBLIC KEY BLOCK"):
    text = base64.encodebytes(data).decode()
    return f"-----BEGIN PGP {kind}-----\n{headers}{text}=AAAA\n-----END PGP {kind}-----\n"


def fingerprint(body):
    """RFC 9580, section 5.5.4.2."""
    return hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body, usedforsecurity=False).hexdigest().upper()


KEY = b"\x04" + bytes(range(90))
LONG_KEY = b"\x04" + bytes(250) * 2
USER = bytes([0xCD, 4]) + b"name"


@pytest.mark.parametrize("header", ["new", "new, five octets", "old, one octet", "old, two octets", "old, four octets"])
def test_fingerprints_of_all_packet_headers(header):
    assert openpgp_fingerprints(armour(packet(KEY, header) + USER)) == [fingerprint(KEY)]


def test_long_keys_several_keys_and_armour_without_headers():
    text = armour(packet(KEY) + USER + packet(LONG_KEY), headers="\n")
    assert openpgp_fingerprints(text) == [fingerprint(KEY), fingerprint(LONG_KEY)]


def test_key_in_a_second_armour_is_found():
    """A package manager may read both blocks, so the lookup must check the second block too."""
    text = armour(packet(KEY)) + "text between\n" + armour(packet(LONG_KEY))
    assert openpgp_fingerprints(text) == [fingerprint(KEY), fingerprint(LONG_KEY)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not an ASCII-armoured"),
        ("<html>not found</html>", "not an ASCII-armoured"),
        ("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nAAAA\n", "not an ASCII-armoured"),
        (armour(packet(KEY)).replace("AAEC", "A*EC"), "damaged"),
        (armour(packet(KEY)[:-3]), "truncated"),
        (armour(packet(KEY) + b"\xc6"), "truncated"),
        # The text is refused, because a package manager might find a key in it that the lookup does not find.
        (armour(packet(KEY) + b"\x06" + bytes(9)), "not an OpenPGP packet"),
        (armour(packet(KEY) + b"\x9b" + KEY), "length"),
        (armour(packet(KEY) + b"\xc6\xe1" + KEY), "length"),
        (armour(packet(KEY) + packet(b"\x06" + bytes(50))), "version 6"),
        (armour(packet(KEY)) + armour(packet(LONG_KEY), kind="MESSAGE"), "something other"),
    ],
)
def test_invalid_key_is_refused(text, words):
    with pytest.raises(AnsibleFilterError, match=words):
        openpgp_fingerprints(text)


def test_fingerprints_match_gpgs():
    if not shutil.which("gpg"):
        pytest.skip("gpg is not installed; only the constructed packets above are tested.")
    # The folder is not tmp_path, because the path of gpg-agent's socket is limited to about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="gpg-") as home:
        environment = {**os.environ, "GNUPGHOME": home}

        def gpg(*words):
            command = ["gpg", "--batch", "--quiet", *words]
            return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

        try:
            for name, kind in (("first", "ed25519"), ("second", "rsa2048")):
                gpg("--passphrase", "", "--quick-generate-key", name, kind, "sign", "never")
            listed = [line.split(":") for line in gpg("--with-colons", "--fingerprint").splitlines()]
            expected = [fields[9] for fields in listed if fields[0] == "fpr"]
            assert len(expected) == 2
            assert openpgp_fingerprints(gpg("--armor", "--export")) == expected
        finally:
            subprocess.run(["gpgconf", "--kill", "all"], env=environment, check=False)


def read(path, expected):
    lookup = lookup_loader.get("django_celery.stack.signing_keys")
    return lookup.run([{"key": str(path), "fingerprint": expected}], {}, variable="erlang_repository_keys")


def test_key_with_the_expected_fingerprint_is_returned(tmp_path):
    file = tmp_path / "key.asc"
    file.write_text(armour(packet(KEY)))
    # Publishers write fingerprints in groups of four, in upper or lower case.
    expected = fingerprint(KEY).lower()
    assert read(file, " ".join(expected[at : at + 4] for at in range(0, 40, 4))) == [file.read_text()]


def test_a_key_is_loaded_from_a_url(tmp_path):
    # The text has an empty line and a line that ends in CR LF, as a server may send it. The text must stay unchanged.
    text = armour(packet(KEY)) + "\n\r\n"
    (tmp_path / "key.asc").write_bytes(text.encode())
    assert read((tmp_path / "key.asc").as_uri(), fingerprint(KEY)) == [text]


@pytest.mark.parametrize("text", [armour(packet(LONG_KEY)), armour(packet(KEY)) + armour(packet(LONG_KEY))])
def test_unexpected_key_is_refused(tmp_path, text):
    (tmp_path / "key.asc").write_text(text)
    with pytest.raises(AnsibleError, match=f"of erlang_repository_keys has the fingerprint .*{fingerprint(LONG_KEY)}, not"):
        read(tmp_path / "key.asc", fingerprint(KEY))


def test_missing_key_is_named(tmp_path):
    with pytest.raises(AnsibleError, match=r"/nowhere.asc of erlang_repository_keys can't be read: No such file or directory\."):
        read(tmp_path / "nowhere.asc", fingerprint(KEY))
