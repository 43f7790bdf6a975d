"""Tests the files of a certificate authority and of a service, and when the role replaces the certificate."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509

DIRECTORY = "/etc/ssl/example"
SERVICE = {"name": "example", "directory": DIRECTORY, "group": "games", "names": ["example.test", "192.0.2.10"]}


@pytest.fixture
def read(host):
    """Returns the text of a file of the service."""

    def text(name):
        with host.sudo():
            return host.file(f"{DIRECTORY}/{name}.pem").content_string

    return text


@pytest.fixture
def certificate(read):
    return lambda: x509.load_pem_x509_certificate(read("certificate").encode())


@pytest.fixture
def converge(run_playbook):
    """Runs the role with other variables; returns its output."""

    def run(**variables):
        done = run_playbook("molecule/certificates/converge.yml", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def days_left(certificate):
    return (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days


def test_certificate_has_the_names_and_is_signed_by_the_authority(host, certificate):
    names = certificate().extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["example.test"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.10"]
    authority = host.file("/etc/ssl/example-ca.pem").content_string
    certificate().verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))


def test_only_the_group_can_read_the_key(host):
    read = f"cat {DIRECTORY}/key.pem"
    with host.sudo():
        assert "PRIVATE KEY" in host.check_output(f"runuser -u games -- {read}")
        assert host.run(f"runuser -u daemon -- {read}").rc == 1


def test_key_of_the_authority_is_on_no_host(host):
    with host.sudo():
        assert (
            host.run("grep -r 'PRIVATE KEY' /etc/ssl/example-ca.pem /etc/ssl/example/ca.pem /etc/ssl/example/certificate.pem").rc
            == 1
        )


def test_certificate_is_replaced_before_it_expires(converge, certificate, read):
    """The key does not change."""
    key = read("key")
    # The role replaces the certificate, because it is valid for only 397 days.
    output = converge(certificates_renewal_days=398, certificates_days=400)
    assert "The certificate of example is valid for 399 days." in output
    first = certificate()
    assert days_left(first) == 399
    # The new certificate is valid for 400 days, so the role keeps it.
    converge(certificates_renewal_days=300, certificates_days=500)
    assert certificate() == first
    converge(certificates_renewal_days=450, certificates_days=500)
    assert days_left(certificate()) == 499
    assert read("key") == key


def test_certificate_is_replaced_if_its_names_change(converge, certificate):
    before = certificate()
    converge(certificates_services=[{**SERVICE, "names": ["other.test"]}])
    names = certificate().extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["other.test"]
    converge()
    assert certificate().serial_number != before.serial_number


def test_given_certificate_is_written_and_must_have_the_names(host, run_playbook, converge, read):
    given = {**SERVICE, "certificate": read("certificate"), "key": read("key")}
    converge(certificates_services=[given], certificates_authority_key="")
    assert read("certificate") == given["certificate"]
    wrong = {**given, "names": ["example.test", "unknown.test"]}
    done = run_playbook("molecule/certificates/converge.yml", certificates_services=[wrong])
    assert done.returncode == 2
    assert "allowed: a certificate that is valid now for DNS:example.test, DNS:unknown.test" in " ".join(done.stdout.split())
