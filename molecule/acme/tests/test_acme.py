"""Tests the certificates that the role nginx gets from an ACME server. The host acme1 runs Pebble, Let's Encrypt's test server.

Pebble resolves the names of the proxies to proxy1, so it never connects to proxy2.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time

import pytest

NAME, OTHER_NAME = "shop.example.org", "www.example.org"
PROXIES = ("proxy1", "proxy2")
RENEWAL = "/etc/letsencrypt/renewal/example.conf"
NO_CERTIFICATE = f"got no certificate for {NAME} from https://acme1:14000/dir."
OTHER_CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=given "
    f"-addext subjectAltName=DNS:{NAME} -keyout /etc/ssl/given.key -out /etc/ssl/given.crt"
)


@pytest.fixture(scope="module")
def authority(host):
    """The certificate of the authority that Pebble created at its start."""
    acme1 = host.get_host("ansible://acme1")
    read = "import ssl, urllib.request as u; print(u.urlopen('{}', context=ssl._create_unverified_context()).read().decode())"
    return acme1.check_output(f"""python3 -c "{read.format("https://127.0.0.1:15000/roots/0")}" """)


@pytest.fixture(scope="module")
def connect(host, authority):
    """Returns a function that opens a connection to a proxy, with TLS or without."""

    def open_connection(proxy, name=NAME, tls=True, trusted=authority):
        ports = host.get_host(f"ansible://{proxy}").ansible.get_variables()["testbed_published"]
        plain = socket.create_connection(("127.0.0.1", ports["443" if tls else "80"]), timeout=20)
        if not tls:
            return plain
        return ssl.create_default_context(cadata=trusted).wrap_socket(plain, server_hostname=name)

    return open_connection


@pytest.fixture(scope="module")
def ask(connect):
    """Sends a request; returns status, headers and body."""

    def send(proxy, path="/", name=NAME, headers=None, **how):
        connection = http.client.HTTPConnection(name)
        connection.sock = connect(proxy, name, **how)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()

    return send


@pytest.fixture(scope="module")
def serial(connect):
    """Returns the serial number of the certificate that a proxy serves."""

    def read(proxy, **how):
        with connect(proxy, **how) as connection:
            return connection.getpeercert()["serialNumber"]

    return read


@pytest.fixture
def converge(run_playbook):
    """Runs the playbook for one proxy; returns its return code and its output on one line."""

    def run(proxy, *arguments, **variables):
        # This limit overrides the fixture's.
        done = run_playbook("playbooks/proxy.yml", "--limit", proxy, *arguments, **variables)
        return done.returncode, " ".join(done.stdout.split())

    return run


@pytest.fixture
def server_down(on):
    """Makes the ACME server unreachable for a proxy during a with block."""

    @contextlib.contextmanager
    def down(proxy):
        address = on(proxy, "getent ahostsv4 acme1 | awk 'NR == 1 {print $1}'")
        on(proxy, f"ip route add unreachable {address}")
        try:
            yield
        finally:
            on(proxy, f"ip route del unreachable {address}")

    return down


@pytest.fixture
def forget(on):
    """Removes nginx's configuration and all certificates of a proxy, as on a new host."""

    def remove(proxy):
        on(proxy, "systemctl stop nginx; rm -rf /etc/letsencrypt /etc/nginx/acme /etc/nginx/tls /etc/nginx/nginx.conf")

    return remove


def requests(run):
    """Calls a function in two threads until the with block ends; returns the results."""

    @contextlib.contextmanager
    def during():
        results, ended = [], threading.Event()

        def client():
            while not ended.is_set():
                try:
                    results.append(run())
                except (OSError, http.client.HTTPException) as error:
                    results.append(repr(error))
                time.sleep(0.05)

        threads = [threading.Thread(target=client) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield results
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    return during()


# The first certificate


@pytest.mark.parametrize("proxy", PROXIES)
def test_https_has_a_certificate_of_the_acme_server(ask, proxy):
    status, headers, _ = ask(proxy)
    assert (status, headers["X-Application"]) == (200, "yes")


def test_each_proxy_has_its_own_certificate(serial):
    assert serial("proxy1") != serial("proxy2")


@pytest.mark.parametrize("proxy", PROXIES)
def test_http_is_redirected_except_for_challenges(ask, on, proxy):
    status, headers, _ = ask(proxy, "/a?b=1", tls=False)
    assert (status, headers["Location"]) == (301, f"https://{NAME}/a?b=1")
    # Pebble has connected to the first proxy only, so the second proxy's challenge was forwarded. This tests both directions.
    for owner in PROXIES:
        folder = "/etc/nginx/acme/webroot/.well-known/acme-challenge"
        on(owner, f"mkdir -p {folder} && echo of-{owner} >{folder}/token-of-{owner}")
        status, _, body = ask(proxy, f"/.well-known/acme-challenge/token-of-{owner}", tls=False)
        assert (status, body) == (200, f"of-{owner}\n")
    # The host el9 is a proxy for another name, so it closes the connection.
    assert ask(proxy, "/.well-known/acme-challenge/missing", tls=False)[0] in (404, 502)
    assert ask(proxy, "/.well-known/acme-challenge/../../../request.ini", tls=False)[0] == 400


def test_smoke_reports_the_days_that_are_left(run_playbook):
    done = run_playbook("playbooks/smoke.yml")
    assert done.returncode == 0, done.stdout
    assert f"The certificate that nginx on proxy1 serves for {NAME} is valid for " in " ".join(done.stdout.split())


def test_status_has_the_certificate(host):
    options = "app=example controller_time=0"
    found = host.ansible("django_celery.stack.host_status", options, check=False, become=True)["status"]["certificates"]
    assert [each["path"] for each in found] == ["/etc/letsencrypt/live/example/fullchain.pem"]
    assert found[0]["days"] > 30


# Renewal


def renew(on, proxy):
    """Run the package's service, which the timer starts, while the certificate is due."""
    on(proxy, f"sed -i 's/^.*renew_before_expiry.*$//; 1i renew_before_expiry = 3650 days' {RENEWAL}")
    return on(proxy, "systemctl start certbot.service; systemctl show --property Result --value certbot.service")


def test_timer_of_the_package_is_active(on):
    for proxy in PROXIES:
        assert on(proxy, "systemctl is-enabled certbot.timer; systemctl is-active certbot.timer") == "enabled\nactive"


@pytest.mark.parametrize("proxy", PROXIES)
def test_renewal_reloads_nginx_and_ends_no_request(ask, on, serial, converge, eventually, proxy):
    before, main = serial(proxy), on(proxy, "systemctl show --property MainPID nginx")
    with requests(lambda: ask(proxy)[0]) as statuses:
        assert renew(on, proxy) == "success"
        eventually(lambda: serial(proxy) != before)
    assert len(statuses) > 10
    assert set(statuses) == {200}
    assert on(proxy, "systemctl show --property MainPID nginx") == main
    code, said = converge(proxy)
    assert (code, "changed=0" in said) == (0, True), said


def test_renewal_without_the_acme_server_keeps_the_certificate(ask, on, serial, server_down, converge, eventually):
    before = serial("proxy1")
    with server_down("proxy1"):
        assert renew(on, "proxy1") == "exit-code"
        assert (ask("proxy1")[0], serial("proxy1")) == (200, before)
    # The timer tries again.
    assert renew(on, "proxy1") == "success"
    eventually(lambda: serial("proxy1") != before)
    code, said = converge("proxy1")
    assert (code, "changed=0" in said) == (0, True), said


# Changes


def test_another_name_needs_another_certificate(ask, serial, server_down, converge, eventually):
    before = serial("proxy1")
    names = [NAME, OTHER_NAME]
    with server_down("proxy1"):
        for _ in range(2):
            code, said = converge("proxy1", nginx_server_names=names)
            assert code != 0
            assert f"got no certificate for {NAME}, {OTHER_NAME} from https://acme1:14000/dir. nginx keeps its current" in said
            assert "No route to host" in said
            assert (ask("proxy1")[0], serial("proxy1")) == (200, before)
    code, said = converge("proxy1", nginx_server_names=names)
    assert code == 0, said
    eventually(lambda: ask("proxy1", name=OTHER_NAME)[0] == 200)
    code, said = converge("proxy1", nginx_server_names=names)
    assert (code, "changed=0" in said) == (0, True), said
    code, said = converge("proxy1")
    assert code == 0, said
    eventually(lambda: ask("proxy1")[0] == 200)


def test_name_that_the_acme_server_refuses_ends_the_run(ask, serial, converge):
    before = serial("proxy1")
    code, said = converge("proxy1", nginx_server_names=[NAME, "unknown.example.org"])
    assert code != 0
    # The error contains the ACME server's reason.
    assert "certbot says:" in said
    assert "unknown.example.org" in said.split("certbot says:")[1]
    assert serial("proxy1") == before
    code, said = converge("proxy1")
    assert code == 0, said
    assert serial("proxy1") == before


# A new host while the ACME server is down


def test_first_certificate_without_the_acme_server(ask, on, forget, server_down, converge, eventually):
    forget("proxy2")
    with server_down("proxy2"):
        code, said = converge("proxy2")
        assert code != 0
        assert f"{NO_CERTIFICATE} nginx responds only on port 80." in said
        assert "No route to host" in said
        assert on("proxy2", "systemctl is-active nginx") == "active"
        status, headers, _ = ask("proxy2", tls=False)
        assert (status, headers["Location"]) == (301, f"https://{NAME}/")
        with pytest.raises(OSError, match=r"EOF|reset|refused"):
            ask("proxy2")
    code, said = converge("proxy2")
    assert code == 0, said
    eventually(lambda: ask("proxy2")[0] == 200)
    code, said = converge("proxy2")
    assert (code, "changed=0" in said) == (0, True), said


def test_given_certificate_serves_until_the_first_one_arrives(ask, on, forget, server_down, converge, eventually):
    forget("proxy2")
    on("proxy2", OTHER_CERTIFICATE)
    given = {"trusted": on("proxy2", "cat /etc/ssl/given.crt")}
    variables = {"nginx_certificate": "/etc/ssl/given.crt", "nginx_certificate_key": "/etc/ssl/given.key"}
    with server_down("proxy2"):
        code, said = converge("proxy2", **variables)
        assert code != 0
        assert f"{NO_CERTIFICATE} nginx keeps its current certificate." in said
        assert ask("proxy2", **given)[0] == 200
    code, said = converge("proxy2", **variables)
    assert code == 0, said
    eventually(lambda: ask("proxy2")[0] == 200)
    code, said = converge("proxy2", **variables)
    assert (code, "changed=0" in said) == (0, True), said


def test_end_of_acme_ends_the_renewals(ask, on, converge, eventually):
    code, said = converge("proxy2", nginx_acme_directory_url="")
    assert code == 0, said
    eventually(lambda: ask("proxy2", tls=False)[1]["X-Application"] == "yes")
    assert "No renewals were attempted" in on("proxy2", "certbot renew 2>&1")
    code, said = converge("proxy2", nginx_acme_directory_url="")
    assert (code, "changed=0" in said) == (0, True), said
    code, said = converge("proxy2")
    assert code == 0, said
    eventually(lambda: ask("proxy2")[0] == 200)


# Other platforms


def test_el_without_epel_is_refused(host, converge, eventually):
    el9 = host.get_host("ansible://el9")
    with el9.sudo():
        before = el9.check_output("sha256sum /etc/nginx/nginx.conf")
    code, said = converge("el9", nginx_acme_directory_url="https://acme1:14000/dir")
    assert code != 0
    assert "nginx_acme_directory_url needs the package certbot, and dnf can't install it on el9:" in said
    assert "enable EPEL on the host" in said
    with el9.sudo():
        assert el9.check_output("sha256sum /etc/nginx/nginx.conf") == before
