"""Creates certificate authorities for the tests, each with a server certificate, and prints their folder.

The files are created once per clone in Molecule's folder for temporary files, and never committed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAMES = ("listed", "earlier", "others")


def certificate(name, key, issuer, issuer_key, *, authority):
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not authority:
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    else:
        usage = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def main():
    clone = hashlib.sha256(str(Path(__file__).resolve()).encode()).hexdigest()[:8]
    folder = Path(tempfile.gettempdir()) / f"authorities-{clone}"
    if not folder.exists():
        # Ansible runs this script for all hosts at the same time. The first process that finishes creates the folder; the
        # others use that folder.
        draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        for name in NAMES:
            key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
            authority = f"Test authority {name}"
            (draft / f"{name}.crt").write_bytes(certificate(authority, key, authority, key, authority=True))
            (draft / f"{name}-server.pem").write_bytes(
                server_key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
                + certificate("127.0.0.1", server_key, authority, key, authority=False)
            )
        with contextlib.suppress(OSError):
            draft.rename(folder)
    print(folder, end="")


if __name__ == "__main__":
    main()
