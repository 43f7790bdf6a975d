"""Tests the testbed's names, ports and command lines. The parts that need containers are tested manually."""

from __future__ import annotations

import re
import resource
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from testbed import build, containers, generated, inventory, machine, ports, ssh, stack
from testbed.inventory import Host, parse
from testbed.machine import TestbedError

DIRECTORY = Path("/clone/inventories/sandbox")


def listing(**hosts: dict) -> dict:
    """The output of `ansible-inventory --list` for `hosts`."""
    return {"_meta": {"hostvars": hosts}}


def container(host: str = "node1", **changes) -> containers.Container:
    """A running container of the stack tb-x-sandbox."""
    fields = {
        "name": f"tb-x-sandbox-{host}",
        "host": host,
        "stack": "tb-x-sandbox",
        "clone": Path("/clone"),
        "inventory": DIRECTORY,
        "definition": {"image": "localhost/testbed/debian13:0123456789ab"},
        "running": True,
        "published": {22: 40022, 8000: 8000},
    }
    return containers.Container(**{**fields, **changes})


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch, tmp_path):
    """A machine on which Podman needs no workaround, with a temporary state directory."""
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(machine, "needs_namespace", lambda: False)
    # These containers do not exist, so Podman can't return their addresses.
    monkeypatch.setattr(generated, "_ip", lambda container: "192.0.2.1")


# Names


def test_stack_name_contains_the_inventory_and_differs_between_clones():
    name = inventory.stack_name(Path("/a"), Path("/a/inventories/sandbox"))
    assert name.startswith("tb-")
    assert name.endswith("-sandbox")
    assert name == inventory.stack_name(Path("/a"), Path("/a/inventories/sandbox"))
    assert name != inventory.stack_name(Path("/b"), Path("/b/inventories/sandbox"))


def test_molecule_inventories_are_named_after_their_scenario():
    first = inventory.stack_name(Path("/a"), Path("/a/molecule/erlang/inventory"))
    second = inventory.stack_name(Path("/a"), Path("/a/molecule/flower/inventory"))
    assert first.endswith("-erlang")
    assert second.endswith("-flower")


def test_unusual_directory_names_become_valid_container_names():
    assert inventory.stack_name(Path("/a"), Path("/a/My Env (old)")).endswith("-my-env-old")
    assert inventory.stack_name(Path("/a"), Path("/a/___")).endswith("-inventory")


# Clones


def test_only_hosts_of_deleted_clones_are_removed(monkeypatch, tmp_path):
    gone = [container("a", clone=tmp_path / "gone", stack="tb-gone"), container("b", clone=tmp_path / "gone", stack="tb-gone")]
    monkeypatch.setattr(containers, "containers", lambda: [container("c", clone=tmp_path), *gone])
    removed = []
    monkeypatch.setattr(stack, "_remove_stack", lambda name, inventory: removed.append((name, inventory)))
    stack.remove_abandoned()
    assert removed == [("tb-gone", DIRECTORY)]


# Inventories


def test_testbed_manages_only_hosts_with_a_platform():
    found = parse(DIRECTORY, listing(a={"testbed_platform": "debian13"}, localhost={}))
    assert found.hosts == (Host("a", "debian13", {22: 0}),)


def test_ports_may_be_strings():
    variables = {"testbed_platform": "debian13", "testbed_ports": {"8000": 8000, "15672": 0}}
    assert parse(DIRECTORY, listing(a=variables)).hosts[0].ports == {22: 0, 8000: 8000, 15672: 0}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"testbed_platform": "debian7"}, ["testbed_platform", "debian7", "debian13"]),
        ({"testbed_platform": "mail"}, ["testbed_platform", "mail"]),
        ({"testbed_ports": [8000]}, ["testbed_ports", "[8000]"]),
        ({"testbed_ports": {"8000": "http"}}, ["testbed_ports", "http"]),
        ({"testbed_ports": {"70000": 0}}, ["testbed_ports", "70000"]),
        ({"testbed_ports": {"22": 2222}}, ["testbed_ports", "SSH"]),
        ({"testbed_mail_catcher": True, "testbed_mail_ports": {"0": 1}}, ["testbed_mail_ports"]),
    ],
)
def test_wrong_values_are_reported(variables, words):
    with pytest.raises(TestbedError) as caught:
        parse(DIRECTORY, listing(node1={"testbed_platform": "debian13", **variables}))
    for word in ["node1", *words]:
        assert word in str(caught.value)


def test_host_names_must_resolve():
    with pytest.raises(TestbedError, match="node_1"):
        parse(DIRECTORY, listing(node_1={"testbed_platform": "debian13"}))


def test_inventory_without_testbed_hosts_is_an_error():
    with pytest.raises(TestbedError, match="testbed_platform"):
        parse(DIRECTORY, listing(localhost={}))


def test_mail_catcher_is_an_additional_host():
    variables = {"testbed_platform": "debian13", "testbed_mail_catcher": True}
    found = parse(DIRECTORY, listing(a=variables, b=variables)).hosts
    assert [host.name for host in found] == ["a", "b", "mail"]
    assert found[-1].ports == {1080: 0}
    wanted = {**variables, "testbed_mail_ports": {"1080": 8025}}
    assert parse(DIRECTORY, listing(a=wanted)).hosts[-1].ports == {1080: 8025}


def test_hosts_must_agree_on_the_mail_catchers_ports():
    variables = {"testbed_platform": "debian13", "testbed_mail_catcher": True}
    other = {**variables, "testbed_mail_ports": {"1080": 8025}}
    with pytest.raises(TestbedError, match="testbed_mail_ports"):
        parse(DIRECTORY, listing(a=variables, b=other))


# Ports


def test_taken_port_is_reported_with_its_variable_and_user():
    hosts = [Host("node1", "debian13", {22: 0, 8000: 8000})]
    lines = ports.conflicts(hosts, lambda *_: False, lambda _: "the program nginx (process 7)")
    assert len(lines) == 1
    for word in ("node1", "testbed_ports", "8000", "nginx"):
        assert word in lines[0]


def test_port_that_the_host_publishes_already_is_no_conflict():
    hosts = [Host("node1", "debian13", {8000: 8000})]
    assert ports.conflicts(hosts, lambda host, port: True, lambda _: "itself") == []


def test_two_hosts_cannot_have_the_same_port():
    hosts = [Host("a", "debian13", {80: 8000}), Host("mail", "mail", {1080: 8000})]
    lines = ports.conflicts(hosts, lambda *_: False, lambda _: None)
    assert len(lines) == 1
    assert "testbed_mail_ports" in lines[0]
    assert " a " in lines[0]


def test_listening_ports_are_not_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not ports.is_free(port)
    assert ports.is_free(port)


def test_chosen_ports_are_free_and_never_the_ones_that_programs_get_for_port_0(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = server.getsockname()[1]
    assert given not in ports.PUBLISHED
    with socket.create_server(("127.0.0.1", ports.choose())) as server:
        taken = server.getsockname()[1]
        assert taken in ports.PUBLISHED
        monkeypatch.setattr(ports, "PUBLISHED", range(taken, taken + 2))
        assert ports.choose() == taken + 1


# Podman


def test_podman_run_arguments():
    host = Host("node1", "debian13", {22: 0, 8000: 8000}, "example.org/debian:13")
    words = containers.run_words("tb-x-sandbox", DIRECTORY, host)
    text = " ".join(words)
    assert words[0] == "run"
    assert "--name tb-x-sandbox-node1" in text
    assert "--network tb-x-sandbox --network-alias node1" in text
    assert re.search(r"--publish 127\.0\.0\.1:[23]\d{4}:22 ", text)
    assert "--publish 127.0.0.1:8000:8000" in text
    for capability in ("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"):
        assert f"--cap-add {capability}" in text
    assert "--security-opt unmask=ALL" in text
    assert words[-3:-1] == ["/bin/sh", "-c"]
    assert words[-4].startswith("localhost/testbed/debian13:")


def test_mail_catcher_gets_no_privileges():
    text = " ".join(containers.run_words("tb-x", DIRECTORY, Host("mail", "mail", {1080: 0})))
    assert "--cap-add" not in text
    assert "/sbin/init" not in text


def test_definition_depends_on_image_and_ports():
    host = Host("node1", "debian13", {22: 0}, "example.org/debian:13")
    same = Host("node2", "debian13", {22: 0}, "example.org/debian:13")
    assert containers.definition(host) == containers.definition(same)
    for other in (
        Host("node1", "debian13", {22: 0, 80: 0}, "example.org/debian:13"),
        Host("node1", "debian13", {22: 0}, "example.org/debian:13.1"),
    ):
        assert containers.definition(other) != containers.definition(host)


def test_image_does_not_depend_on_the_host():
    first = build.image_of(Host("a", "debian13", {22: 0}))
    second = build.image_of(Host("b", "debian13", {22: 0, 80: 80}))
    assert first.reference == second.reference


def test_stand_in_uses_another_platforms_root():
    debian, el9 = (build.image_of(Host("a", platform, {22: 0})) for platform in ("debian13", "el9"))
    assert (debian.stands_in, el9.stands_in) == (False, True)
    assert el9.base == debian.base
    assert el9.reference != debian.reference


def test_published_image_is_no_stand_in():
    published = build.image_of(Host("a", "el9", {22: 0}, "example.org/rocky:9"))
    assert not published.stands_in
    assert published.base == "example.org/rocky:9"
    # The machine's mirrors are Debian's.
    assert published.added == ()


def test_environment_variables_set_images_and_platform(monkeypatch):
    hosts = listing(a={"testbed_platform": "debian13"}, b={"testbed_platform": "el9"}, localhost={})
    monkeypatch.setenv("TESTBED_IMAGE_EL9", "example.org/rocky:9")
    assert [(host.platform, host.base_image) for host in parse(DIRECTORY, hosts).hosts] == [
        ("debian13", None),
        ("el9", "example.org/rocky:9"),
    ]
    monkeypatch.setenv("TESTBED_PLATFORM", "debian13")
    assert [host.platform for host in parse(DIRECTORY, hosts).hosts] == ["debian13", "debian13"]


def test_podmans_merged_port_ranges_are_expanded():
    labels = {"host": "a", "stack": "s", "clone": "/c", "inventory": "/i", "definition": "{}"}
    entry = {
        "Names": ["s-a"],
        "State": "exited",
        "Labels": {f"testbed.{key}": value for key, value in labels.items()},
        "Ports": [{"container_port": 8000, "host_port": 9000, "range": 2}],
    }
    found = containers._container(entry)
    assert found.published == {8000: 9000, 8001: 9001}
    assert not found.running


@pytest.mark.skipif(sys.platform != "linux", reason="Podman gets limits only on Linux")
def test_limits_are_those_of_the_machine(monkeypatch):
    hard = {resource.RLIMIT_NOFILE: 4096, resource.RLIMIT_NPROC: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (1, hard[number]))
    text = " ".join(machine.limits())
    assert "nofile=4096:4096" in text
    assert "nproc=4096:4096" in text
    hard[resource.RLIMIT_NOFILE] = resource.RLIM_INFINITY
    assert "nofile=-1:-1" in " ".join(machine.limits())


def test_mirrors_are_found_in_both_apt_formats():
    text = """
    # deb http://old.example/debian trixie main
    deb [signed-by=/k.gpg] http://mirror.example/debian/ trixie main
    URIs: https://mirror.example/debian-security
    deb http://elsewhere.example/ubuntu noble main
    deb http://second.example/debian trixie main
    """
    assert machine.mirrors_in(text) == {
        "debian": "http://mirror.example/debian",
        "security": "https://mirror.example/debian-security",
    }


# Generated variables


def test_generated_variables_are_literal_and_private(tmp_path, monkeypatch):
    certificate = tmp_path / "extra.crt"
    monkeypatch.setenv("TESTBED_CA_CERTIFICATES", str(certificate))
    hosts = [container(), container("mail", published={1080: 8025})]
    changed = generated.write(tmp_path, hosts)
    host_file = tmp_path / "host_vars/node1/testbed.yml"
    group_file = tmp_path / "group_vars/all/90-testbed.yml"
    assert sorted(changed) == sorted([host_file, group_file])
    assert {path.stat().st_mode & 0o777 for path in changed} == {0o600}
    text = host_file.read_text()
    assert "{{" not in text
    assert "ansible_port: 40022" in text
    assert "'8000': 8000" in text
    assert "ControlPath" not in text
    assert str(certificate) in group_file.read_text()
    assert "testbed_mail_host: mail" in group_file.read_text()
    assert generated.write(tmp_path, hosts) == []
    generated.remove(tmp_path)
    assert list(tmp_path.glob("*_vars")) == []


def test_variables_of_a_stand_in_are_included(tmp_path):
    files = ssh.host_files("tb-x-sandbox", "node1")
    files.mkdir(parents=True)
    (files / "variables.yml").write_text("erlang_repository_urls: [file:///srv]\n")
    generated.write(tmp_path, [container()])
    text = (tmp_path / "host_vars/node1/testbed.yml").read_text()
    assert "file:///srv" in text
    assert f"testbed_files: {files}" in text
    assert "testbed_platform: debian13" in text


def test_removal_keeps_other_variables(tmp_path):
    generated.write(tmp_path, [container()])
    kept = tmp_path / "group_vars/all/10-mine.yml"
    kept.write_text("a: 1\n")
    generated.remove(tmp_path)
    assert kept.exists()
    assert not (tmp_path / "host_vars").exists()


def test_pinned_keys_are_read_back():
    ssh.pin("tb-x", {40022: "ssh-ed25519 AAAA"})
    assert ssh.pinned("tb-x") == {40022: "ssh-ed25519 AAAA"}
    assert ssh.known_hosts("tb-x").stat().st_mode & 0o777 == 0o600
    assert "StrictHostKeyChecking=yes" in ssh.common_arguments("tb-x")
