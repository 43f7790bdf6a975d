"""Tests nginx from the role nginx, in front of an application that handles one request at a time."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
from contextlib import ExitStack

import pytest

NAME = "shop.example.org"


@pytest.fixture(scope="module")
def certificate(host):
    with host.sudo():
        return host.check_output("cat /etc/ssl/example.crt")


@pytest.fixture(scope="module")
def connect(published, certificate):
    """Returns a function that opens a TLS connection, or a plain one to port 80."""

    def open_connection(tls=True, name=NAME, trusted=certificate):
        plain = socket.create_connection(("127.0.0.1", published(443 if tls else 80)), timeout=60)
        if not tls:
            return plain
        context = ssl.create_default_context(cadata=trusted)
        return context.wrap_socket(plain, server_hostname=name)

    return open_connection


@pytest.fixture(scope="module")
def ask(connect):
    """Sends a request whose path is not normalized; returns status, headers and body."""

    def send(path, method="GET", headers=None, body=None, name=NAME, **how):
        connection = http.client.HTTPConnection(name)
        connection.sock = connect(**how)
        try:
            connection.putrequest(method, path, skip_host=True)
            wanted = {"Host": name, **(headers or {})}
            if body is not None:
                wanted["Content-Length"] = str(len(body))
            for header, value in wanted.items():
                connection.putheader(header, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    return send


# TLS


def test_https_reaches_the_application(ask):
    status, headers, body = ask("/hello?a=1")
    assert (status, headers["X-Application"]) == (200, "yes")
    assert json.loads(body)["path"] == "/hello?a=1"
    assert "nginx/" not in headers.get("Server", "")


def test_http_is_redirected_to_https(ask):
    status, headers, _ = ask("/hello?a=1", tls=False)
    assert (status, headers["Location"]) == (301, "https://shop.example.org/hello?a=1")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_only_current_versions_of_tls_are_accepted(published, version):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    # Without this level, the client's own library refuses TLS 1.1.
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", published(443)), timeout=10) as plain:
        if version == ssl.TLSVersion.TLSv1_1:
            with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                context.wrap_socket(plain, server_hostname=NAME)
        else:
            assert context.wrap_socket(plain, server_hostname=NAME).version() == version.name.replace("_", ".")


def test_http_2_is_offered(published, certificate):
    context = ssl.create_default_context(cadata=certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", published(443)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=NAME) as tls,
    ):
        assert tls.selected_alpn_protocol() == "h2"


def test_other_host_names_get_no_response(ask, connect):
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        ask("/", tls=False, name="other.example.org")
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        connect(name="other.example.org")


# Requests


def test_client_address_and_scheme_arrive(ask):
    false = {"X-Forwarded-For": "192.0.2.66", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "a", "Forwarded": "for=192.0.2.66"}
    seen = json.loads(ask("/", headers=false)[2])["headers"]
    assert seen["X-Forwarded-Proto"] == "https"
    assert ipaddress.ip_address(seen["X-Forwarded-For"]) != ipaddress.ip_address("192.0.2.66")
    assert seen["Host"] == NAME
    assert "X-Forwarded-Host" not in seen and "Forwarded" not in seen


@pytest.mark.parametrize("given", [f"{NAME}:8443", f"{NAME.upper()}:8443"])
def test_port_in_the_request_arrives(ask, given):
    assert json.loads(ask("/", headers={"Host": given})[2])["headers"]["Host"] == f"{NAME}:8443"


@pytest.mark.parametrize("clients", [8, 200])
@pytest.mark.parametrize("tls", [False, True])
def test_clients_that_send_half_a_header_do_not_stop_others(ask, connect, clients, tls):
    with ExitStack() as stack:
        for _ in range(clients):
            stack.enter_context(connect(tls=tls)).sendall(b"GET / HTTP/1.1\r\nHost: shop.example.org\r\nX-Half: ")
        waits = []
        for _ in range(10):
            begin = time.monotonic()
            assert ask("/")[0] == 200
            waits.append(time.monotonic() - begin)
        assert max(waits) < 2


def test_clients_that_send_half_a_body_do_not_stop_others(ask, connect):
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect()).sendall(b"POST / HTTP/1.1\r\nHost: shop.example.org\r\nContent-Length: 100\r\n\r\nhalf")
        begin = time.monotonic()
        assert ask("/")[0] == 200
        assert time.monotonic() - begin < 2


def test_body_is_limited(ask):
    assert json.loads(ask("/", "POST", body=b"x" * 1024**2)[2])["length"] == 1024**2
    # nginx responds before it reads the body.
    assert ask("/", "POST", headers={"Content-Length": str(3 * 1024**2)})[0] == 413


CLOSED = ["/metrics", "//metrics", "/%6detrics", "/x/../metrics", "/metrics?a=1", "/private/", "/private/x"]


@pytest.mark.parametrize("path", CLOSED)
def test_closed_path_does_not_reach_the_application(ask, path):
    status, headers, _ = ask(path)
    assert status == 404
    assert "X-Application" not in headers


def test_path_with_the_same_beginning_as_a_closed_path_is_open(ask):
    assert ask("/metrics-of-sales")[0] == 200


def test_requests_beyond_the_rate_are_refused(ask):
    statuses = [ask("/login/x")[0] for _ in range(6)]
    assert statuses == [200] * 3 + [429] * 3
    assert ask("/")[0] == 200


def test_static_file_comes_from_nginx(ask):
    status, headers, body = ask("/static/site.css")
    assert (status, body) == (200, "body {}\n")
    assert headers["Content-Type"] == "text/css"
    assert headers["Cache-Control"] == "public, max-age=60"
    assert "X-Application" not in headers


def test_missing_static_file_comes_from_the_application(ask):
    assert json.loads(ask("/static/missing.css")[2])["path"] == "/static/missing.css"


PARENTS = ["/static/../secret.txt", "/static/%2e%2e/secret.txt", "/static../secret.txt", "/static/..%2fsecret.txt"]


@pytest.mark.parametrize("path", [*PARENTS, "/static/link.txt", "/static/"])
def test_other_files_are_not_served(ask, path):
    _, _, body = ask(path)
    assert "not-for-clients" not in body
    assert "site.css" not in body


def test_location_of_another_service_passes_the_path(ask):
    seen = json.loads(ask("/other/page?b=2")[2])
    assert (seen["server"], seen["path"]) == ("other", "/other/page?b=2")


@pytest.mark.parametrize("path", ["/socket", "/other/socket"])
def test_websocket_connection_is_forwarded(connect, path):
    with connect() as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: {NAME}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        connection.sendall(head.encode())
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 101 ")
        connection.sendall(b"hello")
        while b"hello" not in answer:
            more = connection.recv(4096)
            assert more, answer
            answer += more


# Changes


def state(host):
    with host.sudo():
        return host.check_output("sha256sum /etc/nginx/nginx.conf; systemctl show --property MainPID,StateChangeTimestamp nginx")


def test_configuration_with_an_error_is_refused(host, run_playbook, ask):
    before = state(host)
    done = run_playbook("playbooks/proxy.yml", nginx_upstreams=["no-such-host.invalid:80"])
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    assert "refuses the new configuration, and keeps the current one" in said
    assert 'host not found in upstream "no-such-host.invalid:80"' in said.replace('\\"', '"')
    assert state(host) == before
    assert ask("/")[0] == 200
    done = run_playbook("playbooks/proxy.yml")
    assert (done.returncode, "changed=0" in done.stdout) == (0, True), done.stdout


def test_change_reloads_nginx_and_ends_no_request(host, run_playbook, ask, eventually):
    main = "systemctl show --property MainPID --value nginx"
    before = host.check_output(main)
    slow = []
    client = threading.Thread(target=lambda: slow.append(ask("/slow")[0]))
    client.start()
    done = run_playbook("playbooks/proxy.yml", nginx_hsts_max_age=60)
    assert done.returncode == 0, done.stdout
    # The request began before the reload and ends after it.
    assert slow == []
    client.join()
    assert slow == [200]
    assert host.check_output(main) == before
    eventually(lambda: ask("/")[1]["Strict-Transport-Security"] == "max-age=60")
    done = run_playbook("playbooks/proxy.yml")
    assert done.returncode == 0, done.stdout
    eventually(lambda: "Strict-Transport-Security" not in ask("/")[1])


def test_certificate_from_a_variable(host, run_playbook, ask, certificate, eventually):
    with host.sudo():
        texts = {name: host.check_output(f"cat /etc/ssl/another.{name}") for name in ("crt", "key")}
    done = run_playbook("playbooks/proxy.yml", "-vvv", "--diff", nginx_certificate=texts["crt"], nginx_certificate_key=texts["key"])
    assert done.returncode == 0, done.stdout
    assert texts["key"].splitlines()[1] not in done.stdout + done.stderr
    eventually(lambda: ask("/", trusted=texts["crt"])[0] == 200)
    with pytest.raises(ssl.SSLCertVerificationError):
        ask("/", trusted=certificate)
    with host.sudo():
        assert host.check_output("stat --format '%a %U' /etc/nginx/tls /etc/nginx/tls/*").split("\n") == ["700 root", "600 root"]
    # This key belongs to another certificate.
    with host.sudo():
        other = host.check_output("cat /etc/ssl/example.crt")
    done = run_playbook("playbooks/proxy.yml", nginx_certificate=other, nginx_certificate_key=texts["key"])
    assert done.returncode != 0
    assert "key values mismatch" in done.stdout
    assert ask("/", trusted=texts["crt"])[0] == 200
    done = run_playbook("playbooks/proxy.yml")
    assert done.returncode == 0, done.stdout
    eventually(lambda: ask("/")[0] == 200)
    with host.sudo():
        assert host.check_output("ls /etc/nginx/tls") == ""


def test_proxy_of_another_application_is_kept(host, run_playbook):
    before = state(host)
    done = run_playbook("playbooks/proxy.yml", nginx_name="other")
    assert done.returncode != 0
    assert "is the proxy of example; a host can be the proxy of one application" in " ".join(done.stdout.split())
    assert state(host) == before


def test_changed_configuration_is_repaired(host, run_playbook, ask, eventually):
    with host.sudo():
        host.check_output("sed -i 's/return 404/return 200/' /etc/nginx/nginx.conf && systemctl reload nginx")
    # A reload returns before the new workers accept connections.
    eventually(lambda: ask("/metrics")[0] == 200)
    done = run_playbook("playbooks/proxy.yml")
    assert done.returncode == 0, done.stdout
    eventually(lambda: ask("/metrics")[0] == 404)


# fail2ban


@pytest.fixture
def banned(host, is_el):
    """Returns the addresses that fail2ban bans. Afterwards, no address is banned."""
    if is_el:
        pytest.skip("The Red Hat family does not package fail2ban.")

    def addresses():
        with host.sudo():
            return host.check_output("fail2ban-client get nginx-sign-in banip").split()

    yield addresses
    with host.sudo():
        host.check_output("fail2ban-client unban --all")


def failures(host):
    """The number of failed logins that fail2ban has counted since its start."""
    with host.sudo():
        return int(re.search(r"Total failed:\t(\d+)", host.check_output("fail2ban-client status nginx-sign-in"))[1])


def test_ten_failed_logins_ban_an_address(host, ask, banned, eventually):
    before = failures(host)
    for _ in range(8):
        assert ask("/sign-in/?next=/", "POST", body=b"password=wrong")[0] == 200
    # Neither a page nor a request without a password is a failed login.
    for _ in range(10):
        assert ask("/sign-in/")[0] == 200
        assert ask("/other/refused")[0] == 401
    name = "Basic " + base64.b64encode(b"flo [x] wer:wrong").decode()
    assert ask("/other/refused", headers={"Authorization": name})[0] == 401
    eventually(lambda: failures(host) == before + 9)
    assert banned() == []
    assert ask("/other/refused", headers={"Authorization": name})[0] == 401
    eventually(lambda: len(banned()) == 1)
    with pytest.raises(OSError):
        ask("/")


def test_fail2ban_is_refused_without_a_package_of_the_distribution(host, run_playbook, is_el):
    if not is_el:
        pytest.skip("Debian packages fail2ban.")
    before = state(host)
    done = run_playbook("playbooks/proxy.yml", nginx_fail2ban=True)
    assert done.returncode != 0
    assert "which does not package fail2ban. Debian and Ubuntu do. On the Red Hat family, only EPEL has it" in " ".join(
        done.stdout.split()
    )
    assert state(host) == before


def test_jail_is_removed_and_created_again(host, run_playbook, banned):
    for wanted in (False, True):
        done = run_playbook("playbooks/proxy.yml", nginx_fail2ban=wanted)
        assert done.returncode == 0, done.stdout + done.stderr
        with host.sudo():
            assert ("nginx-sign-in" in host.check_output("fail2ban-client status")) == wanted
    assert banned() == []


# The service


def test_nginx_can_write_only_its_own_directories(host):
    with host.sudo():
        pid = host.check_output("systemctl show --property MainPID --value nginx")
        done = host.run(f"nsenter --mount --target {pid} touch /etc/nginx/probe")
        assert (done.rc, "Read-only file system" in done.stderr) == (1, True)
        host.check_output(f"nsenter --mount --target {pid} touch /var/log/nginx/probe")
        status = host.check_output(f"grep -E 'NoNewPrivs|Seccomp:' /proc/{pid}/status")
    assert status.split() == ["NoNewPrivs:", "1", "Seccomp:", "2"]


def test_killed_nginx_comes_back(host, ask, eventually):
    with host.sudo():
        host.check_output("systemctl kill --signal=KILL nginx")
    eventually(lambda: ask("/")[0] == 200)


def test_nginx_starts_after_a_reboot(host, reboot, ask, eventually):
    reboot()
    eventually(lambda: ask("/")[0] == 200)
