"""Tests the Erlang that the role erlang installs: applications, version, pin, and refused packages."""

from __future__ import annotations

import re

import pytest


def erl(host, expression):
    return host.check_output(f"erl -noshell -eval 'io:format(\"~p\", [{expression}]), halt().'")


def test_release_is_the_requested_one(host):
    assert erl(host, "erlang:system_info(otp_release)") == '"27"'


def test_applications_that_rabbitmq_needs_start(host):
    assert erl(host, "[application:ensure_all_started(A) || A <- [ssl, mnesia, os_mon, inets, eldap, xmerl]]").count("{ok") == 6


def test_tls_1_3_is_supported(host):
    # The application ssl reads its configuration when it starts.
    supported = "begin {ok, _} = application:ensure_all_started(ssl), proplists:get_value(supported, ssl:versions()) end"
    assert "'tlsv1.3'" in erl(host, supported)


def test_just_in_time_compiler_is_enabled(host):
    assert erl(host, "erlang:system_info(emu_flavor)") == "jit"


def test_package_manager_prefers_the_pinned_version(host, is_el):
    """The pin has a higher priority than the other versions in the repositories."""
    if is_el:
        with host.sudo():
            offered = host.check_output("dnf --quiet repoquery --queryformat '%{version}\n' erlang").split()
        assert offered and all(version.startswith("27.") for version in offered)
        return
    policy = host.check_output("apt-cache policy erlang-base")
    candidate = next(line for line in policy.splitlines() if "Candidate:" in line)
    assert candidate.split(":", 1)[1].strip().startswith("1:27.")
    assert " 1001" in policy


def test_complete_version_can_be_requested(host, is_el, run_playbook):
    """The variable may be a complete version, although the package's version also has the distribution's suffix."""
    query = (
        "rpm -q --queryformat '%{version}' erlang"
        if is_el
        else "dpkg-query --show --showformat '${source:Upstream-Version}' erlang-base"
    )
    whole = re.match(r"[\d.]+", host.check_output(query)).group()
    assert whole.count(".") > 1
    done = run_playbook("molecule/erlang/converge.yml", erlang_version=whole)
    assert done.returncode == 0, done.stdout
    if not is_el:
        assert " 1001" in host.check_output("apt-cache policy erlang-base")
    # Restore the version for the other tests.
    assert run_playbook("molecule/erlang/converge.yml").returncode == 0


@pytest.fixture
def newer_release(host, is_el):
    """A repository with a newer package of the series; yields its name and version."""
    if is_el:
        pytest.skip("The scenario rabbitmq tests this on EL, whose stand-in has two releases.")
    name, folder = "erlang-eldap", "/srv/newer"
    with host.sudo():
        host.check_output(f"mkdir {folder} && cd {folder} && apt-get -qq download {name} && dpkg-deb -R {name}_*.deb {name}")
        host.check_output(f"cd {folder} && rm {name}_*.deb && sed -Ei 's/^Version: .*/&+newer/' {name}/DEBIAN/control")
        host.check_output(
            f"cd {folder} && dpkg-deb -b {name} ./{name}.deb && (dpkg-deb -f {name}.deb; echo Filename: {name}.deb; "
            f"echo Size: $(stat -c %s {name}.deb); sha256sum {name}.deb | sed 's/ .*//; s/^/SHA256: /') >Packages"
        )
        host.check_output(f"echo 'deb [trusted=yes] file:{folder} ./' >/etc/apt/sources.list.d/newer.list && apt-get -qq update")
        yield name, host.check_output(f"dpkg-deb -f {folder}/{name}.deb Version")
        host.check_output(f"rm -r {folder} /etc/apt/sources.list.d/newer.list && apt-get -qq update")


def test_run_does_not_upgrade_to_a_newer_release(host, newer_release, run_playbook):
    name, version = newer_release
    assert f"Candidate: {version}" in host.check_output(f"apt-cache policy {name}")
    done = run_playbook("molecule/erlang/converge.yml")
    assert done.returncode == 0 and "changed=0 " in done.stdout, done.stdout
    assert host.package(name).version != version


def test_removed_package_is_reinstalled(host, newer_release, run_playbook):
    """The run does not upgrade other packages that have a newer release."""
    with host.sudo():
        host.check_output("dpkg --remove erlang-xmerl")
    done = run_playbook("molecule/erlang/converge.yml")
    assert done.returncode == 0 and "changed=1 " in done.stdout, done.stdout
    assert host.package("erlang-xmerl").is_installed
    name, version = newer_release
    assert host.package(name).version != version


# Packages that the role must refuse. Only the stand-in of EL has repositories with such packages.


@pytest.fixture(scope="module")
def stand_in(variables):
    if "testbed_bad_repositories" not in variables:
        pytest.skip("Only the stand-in of an EL host has bad repositories.")
    return variables


@pytest.fixture(scope="module")
def install(host, stand_in, run_playbook):
    """Runs the role on a host without Erlang and its key. Installs a working Erlang afterwards."""
    team = stand_in["erlang_repository_keys"][0]["fingerprint"]

    def run(**variables):
        with host.sudo():
            # This command may fail: if the role refused the package in the previous test, there is no package to remove.
            host.run(f"rpm --erase --nodeps erlang; rpm --erase gpg-pubkey-{team[-8:].lower()}")
            # `dnf clean all` would leave the key that signs metadata.
            host.check_output("rm -rf /var/cache/dnf /var/cache/ansible-rabbitmq-erlang")
        return run_playbook("molecule/erlang/converge.yml", **variables)

    yield run
    done = run()
    assert done.returncode == 0, done.stdout
    assert host.package("erlang").is_installed


@pytest.fixture
def refused(host, install):
    """Runs the role, which must fail and install nothing; returns Ansible's output."""

    def run(**variables):
        done = install(**variables)
        assert done.returncode == 2, done.stdout
        assert not host.package("erlang").is_installed
        return " ".join(done.stdout.split())

    return run


@pytest.fixture
def folder(host, stand_in, tmp_path):
    """Returns a local folder with the package of an invalid repository."""

    def fetch(kind):
        with host.sudo():
            (path,) = host.check_output(
                f"ls {stand_in['testbed_bad_repositories'].removeprefix('file://')}/{kind}/*/el/9/*/*.rpm"
            ).split()
            (tmp_path / "erlang.rpm").write_bytes(host.file(path).content)
        return str(tmp_path)

    return fetch


def test_altered_package_is_refused(refused, stand_in):
    said = refused(erlang_repository_urls=[f"{stand_in['testbed_bad_repositories']}/tampered/erlang"])
    assert "erlang-27.9-1" in said
    assert "dnf refuses packages and metadata that are unsigned, altered, or signed with a key" in said


def test_package_signed_by_a_foreign_key_is_refused(refused, stand_in):
    """The package is refused although the right key signed the metadata."""
    said = refused(erlang_repository_urls=[f"{stand_in['testbed_bad_repositories']}/foreign/erlang"])
    assert "Failed to validate GPG signature for erlang-27.9-1" in said


def test_unsigned_repository_is_refused(refused, stand_in):
    said = refused(erlang_repository_urls=[f"{stand_in['testbed_bad_repositories']}/unsigned/erlang"])
    assert "repomd.xml.asc" in said
    assert "Erlang was not installed from file:///srv/repositories/bad/unsigned/erlang" in said


def test_repository_signed_by_a_foreign_key_is_refused(refused, stand_in):
    stranger = {"key": f"{stand_in['testbed_files']}/stranger.asc", "fingerprint": stand_in["testbed_stranger"]["fingerprint"]}
    said = refused(erlang_repository_keys=[stranger])
    assert "GPG signature verification error" in said
    assert "If the mirror has a new key, add it to erlang_repository_keys" in said


def test_key_with_an_unexpected_fingerprint_is_not_copied(host, refused, stand_in):
    key = {"key": f"{stand_in['testbed_files']}/stranger.asc", "fingerprint": "A16A42516F6A691BC1FF5621E495BB49CC4BBE5B"}
    said = refused(erlang_repository_keys=[key])
    assert "not A16A42516F6A691BC1FF5621E495BB49CC4BBE5B, which erlang_repository_keys lists. Nothing was added to" in said
    assert not host.file("/etc/pki/rpm-gpg/RPM-GPG-KEY-A16A42516F6A691BC1FF5621E495BB49CC4BBE5B").exists


def test_signed_rpm_from_a_folder_is_installed(host, install, folder):
    """Uses the RPM from the repository in which only the metadata is unsigned."""
    done = install(erlang_source="folder", erlang_folder=folder("unsigned"))
    assert done.returncode == 0, done.stdout
    assert host.package("erlang").version == "27.9"


def test_altered_rpm_from_a_folder_is_refused(refused, folder):
    path = folder("tampered")
    said = refused(erlang_source="folder", erlang_folder=path)
    assert "NOT OK" in said
    assert f"Erlang was not installed from {path}" in said
