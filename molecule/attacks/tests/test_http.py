"""Attacks with HTTP requests, through nginx and on the web service behind it."""

from __future__ import annotations

import json
import re
import socket
import time
import uuid
from contextlib import ExitStack

import pytest
import requests

NAME = "mail.example.org"
DOORS = pytest.mark.parametrize("door", ["nginx", "gunicorn"])


def kind(name):
    return pytest.mark.attack(kind=f"HTTP: {name}")


def request(path="/healthz", method="GET", body=b"", host=NAME, **headers):
    """The bytes of a request. Underscores in names of headers become hyphens."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body and not {"Content_Length", "Transfer_Encoding"} & set(headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


# ---- Paths ----

OUTSIDE = [
    "/static/../manage.py",
    "/static/..%2fmanage.py",
    "/static/%2e%2e/environment",
    "/static/..%5c..%5cenvironment",
    "/static/%252e%252e/environment",
    "/static//etc/passwd",
    "/static/....//....//etc/passwd",
    "/static/%c0%ae%c0%ae/environment",
    "/static../environment",
    "/static/%00/../environment",
    "//etc/passwd",
    "/../../../../etc/passwd",
    "/static/emails/../../../../../../etc/passwd",
    "/.env",
    "/environment",
    "/.git/config",
    "/static/admin/..;/..;/environment",
]


@kind("traversal")
@DOORS
@pytest.mark.parametrize("path", OUTSIDE)
def test_path_outside_the_static_files_is_not_served(raw, door, path):
    answer = raw(door, request(path))
    assert answer.status in (301, 302, 400, 404), answer.data[:200]
    for text in (b"root:x:0", b"SECRET_KEY", b"DJANGO_SETTINGS_MODULE", b"repositoryformatversion"):
        assert text not in answer.data


# ---- Smuggling ----

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: mail.example.org\r\n\r\n"
CHUNKS = b"0\r\n\r\n" + SMUGGLED
HEAD = b"POST /healthz HTTP/1.1\r\nHost: mail.example.org\r\n"
# The lengths disagree, so the proxy and the web service could disagree about where the next request begins.
SMUGGLING = {
    "length and chunked": HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "chunked and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKS,
    "two lengths": HEAD + b"Content-Length: 0\r\nContent-Length: 50\r\n\r\n" + SMUGGLED,
    "list of lengths": HEAD + b"Content-Length: 0, 50\r\n\r\n" + SMUGGLED,
    "signed length": HEAD + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "hexadecimal length": HEAD + b"Content-Length: 0x0\r\n\r\n" + SMUGGLED,
    "length with an underscore": HEAD + b"Content_Length: 50\r\nContent-Length: abc\r\n\r\n" + SMUGGLED,
    "unknown encoding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "two encodings": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKS,
    "list of encodings": HEAD + b"Transfer-Encoding: identity, chunked\r\n\r\n" + CHUNKS,
    "space before the colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS,
    "vertical tab before the value": HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n" + CHUNKS,
    "null in the value": HEAD + b"Transfer-Encoding: chunked\0\r\n\r\n" + CHUNKS,
    "folded line": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKS,
    "chunk size with a sign": HEAD + b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + SMUGGLED,
    "chunk size with 0x": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + SMUGGLED,
    "chunk size that overflows": HEAD + b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n" + SMUGGLED,
    "chunked in HTTP/1.0": HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "bare CR": HEAD.replace(b"\r\n", b"\r") + b"Content-Length: 0\r\r" + SMUGGLED,
}


@kind("smuggling")
@DOORS
@pytest.mark.parametrize("data", SMUGGLING.values(), ids=SMUGGLING)
def test_request_of_uncertain_length_starts_no_other_request(raw, door, data, journal):
    if door == "gunicorn" and data == SMUGGLING["list of encodings"]:
        pytest.skip("gunicorn reads the chunks, so the length is certain; nginx rejects such requests")
    answer = raw(door, data)
    # Django refuses a form without a token (403) before gunicorn reads the chunks.
    assert answer.statuses() and answer.statuses()[0] in (400, 403, 405, 411, 501), answer.data[:300]
    # If the web service had read the body as another request, it would have answered 404.
    assert 404 not in answer.statuses()
    assert '"GET /smuggled"' not in journal("--unit=mailroom-web")


# ---- Headers and methods ----


@kind("header injection")
@DOORS
@pytest.mark.parametrize(
    "value", ["a\rSet-Cookie: x=1", "a\nSet-Cookie: x=1", "%0d%0aSet-Cookie:%20x=1", "\u0080", "a" * 65, "a b"]
)
def test_request_id_of_a_client_adds_no_header(raw, door, value):
    answer = raw(door, request(X_Request_ID=value))
    assert b"x=1" not in answer.data
    assert answer.status == 400 or re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["X-Request-ID"])


@kind("header injection")
@pytest.mark.parametrize(
    "path", ["/login/%0d%0aSet-Cookie:%20x=1", "/admin%0d%0aLocation:%20http://evil.test", "/x%0aHost:%20evil.test"]
)
def test_redirect_contains_no_line_of_the_path(raw, path):
    answer = raw("nginx", request(path))
    head = answer.data.partition(b"\r\n\r\n")[0]
    assert answer.status in (301, 302, 400, 404)
    assert b"\nSet-Cookie: x" not in head and b"\nLocation: http://evil.test" not in head and b"\nHost:" not in head


@kind("header injection")
@DOORS
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({f"X-{number}": "a" for number in range(150)}, id="150 headers"),
        pytest.param({"X-Long": "a" * 70_000}, id="70 kB"),
        pytest.param({"X Space": "a"}, id="space in the name"),
        pytest.param({"": "a"}, id="no name"),
        pytest.param({"X\0Null": "a"}, id="null in the name"),
    ],
)
def test_bad_headers_are_refused(raw, door, headers):
    head = request() if not headers else request(**headers)
    answer = raw(door, head)
    # nginx removes a header with an invalid name, and forwards the request.
    assert answer.status in (400, 431, 494) or (door == "nginx" and len(headers) == 1 and answer.status == 200), answer.data[:200]


@kind("methods")
@DOORS
@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PUT", "DELETE", "PROPFIND", "DEBUG", "get", "A" * 30])
def test_unexpected_method_is_refused(raw, door, method):
    answer = raw(door, request("/healthz", method, Cookie="secret=1"))
    # Django refuses methods that change something if there is no token (403).
    assert answer.status in (400, 403, 404, 405, 501), answer.data[:200]
    assert b"secret=1" not in answer.data


# ---- Host ----

HOSTS = ["evil.test", "mail.example.org.evil.test", "mail.example.org@evil.test", "evil.test:80", "127.0.0.2", "[::1]", "a b", ""]


@kind("Host")
@DOORS
@pytest.mark.parametrize("name", HOSTS)
def test_unknown_host_is_refused(raw, door, name):
    answer = raw(door, request("/login/", host=name))
    # nginx closes the connection without an answer.
    assert answer.status == 400 or (door == "nginx" and answer.data == b""), answer.data[:200]
    assert b"evil.test" not in answer.data


@kind("Host")
@DOORS
@pytest.mark.parametrize(
    "header", ["X_Forwarded_Host", "X_Host", "Forwarded", "X_Original_URL", "X_Rewrite_URL", "X_Forwarded_Prefix"]
)
def test_header_replaces_neither_host_nor_path(raw, door, header):
    value = "host=evil.test" if header == "Forwarded" else "/metrics" if header.endswith("URL") else "evil.test"
    answer = raw(door, request("/", **{header: value}))
    assert answer.status == 302
    assert answer.headers["Location"].startswith("/login/") and "evil.test" not in answer.headers["Location"]


@kind("Host")
def test_two_host_headers_are_refused(raw):
    answer = raw("nginx", request("/").replace(b"Connection", b"Host: evil.test\r\nConnection"))
    assert answer.status == 400


# ---- Sessions ----


@kind("redirects")
@pytest.mark.parametrize(
    "target",
    [
        "http://evil.test/",
        "//evil.test/",
        "///evil.test",
        "\\\\evil.test",
        "https:evil.test",
        "javascript:alert(1)",
        "/\\evil.test",
        " http://evil.test",
    ],
)
def test_login_does_not_redirect_to_other_sites(site, signed_in, target):
    page = signed_in.get(f"{site}/login/", params={"next": target}, timeout=10)
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
    assert token, page.url
    assert f'action="{target}' not in page.text
    # The login form contains only a local target. A logout always redirects to the login page.
    field = re.search(r'name="next" value="([^"]*)"', page.text)
    assert field is None or not field[1].strip() or (field[1].startswith("/") and not field[1].startswith(("//", "/\\")))


@kind("CSRF")
@pytest.mark.parametrize("path", ["/", "/login/", "/logout/", "/admin/login/", "/admin/emails/apikey/add/"])
@pytest.mark.parametrize(
    "headers", [{}, {"Origin": "http://evil.test"}, {"Origin": "null"}], ids=["no token", "other origin", "null"]
)
def test_form_of_another_site_is_refused(site, signed_in, path, headers):
    form = {
        "csrfmiddlewaretoken": signed_in.cookies["csrftoken"] if headers else "",
        "subject": "x",
        "text": "x",
        "to": "a@example.net",
    }
    answer = signed_in.post(f"{site}{path}", data=form, headers=headers, timeout=10, allow_redirects=False)
    # The requests may have reached nginx's rate limit for the login pages.
    assert answer.status_code in ((403, 429) if "login" in path else (403,))


@kind("CSRF")
@pytest.mark.parametrize("path", ["/api/emails", "/api/emails/batch", "/api/suppressions"])
def test_session_does_not_authenticate_the_api(site, signed_in, path):
    assert signed_in.post(f"{site}{path}", json={}, timeout=10).status_code == 401
    assert signed_in.get(f"{site}{path}", timeout=10).status_code in (401, 405)


@kind("session fixation")
def test_login_replaces_a_session_that_an_attacker_chose(sign_in):
    session = requests.Session()
    session.cookies.set("sessionid", "chosen0by0an0attacker0aaaaaaaaaa")
    session = sign_in(session)
    found = {cookie.value for cookie in session.cookies if cookie.name == "sessionid"}
    assert any(value != "chosen0by0an0attacker0aaaaaaaaaa" for value in found)
    cookie = next(cookie for cookie in session.cookies if cookie.name == "sessionid" and not cookie.value.startswith("chosen"))
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "Lax"


@kind("session fixation")
@pytest.mark.parametrize("value", ["chosen0by0an0attacker0aaaaaaaaaa", "a" * 4000, "../../etc/passwd", "' OR 1=1 --", "\x7f", "0"])
def test_invented_session_signs_nobody_in(site, value):
    answer = requests.get(f"{site}/", cookies={"sessionid": value}, timeout=10, allow_redirects=False)
    assert (answer.status_code, answer.headers.get("Location")) in ((302, "/login/?next=/"), (400, None))


@kind("session fixation")
def test_session_ends_with_the_logout(site, sign_in):
    session = sign_in()
    kept = session.cookies["sessionid"]
    page = session.get(f"{site}/", timeout=10)
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text).group(1)
    session.post(f"{site}/logout/", data={"csrfmiddlewaretoken": token}, headers={"Referer": f"{site}/"}, timeout=10)
    answer = requests.get(f"{site}/", cookies={"sessionid": kept}, timeout=10, allow_redirects=False)
    assert answer.status_code == 302


# ---- Keys, tokens and objects of other users ----

KEYS = [
    "",
    "Bearer",
    "Bearer ",
    "Bearer null",
    "Bearer ' OR '1'='1",
    "Bearer \0",
    "Basic YWRtaW46YWRtaW4=",
    "bearer undefined",
    "Token x",
    f"Bearer {'a' * 9000}",
]


@kind("keys and tokens")
@pytest.mark.parametrize("value", KEYS, ids=range(len(KEYS)))
@pytest.mark.parametrize("path", ["/api/emails", "/metrics"])
def test_wrong_key_or_token_is_refused(raw, path, value):
    answer = raw("gunicorn", request(path, Authorization=value))
    assert answer.status in (400, 401, 431), answer.data[:200]
    assert b"emails_" not in answer.body


@kind("keys and tokens")
@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/x/../metrics", "/./metrics", "/metrics?x=1", "/METRICS"]
)
def test_proxy_closes_the_metrics_even_with_the_token(raw, variables, path):
    answer = raw("nginx", request(path, Authorization=f"Bearer {variables['secret_app_metrics_token']}"))
    assert answer.status == 404
    assert b"emails_" not in answer.body


@kind("keys and tokens")
def test_tokens_are_not_interchangeable(raw, variables):
    for path, name in (("/api/emails", "secret_app_metrics_token"), ("/metrics", "secret_app_api_key")):
        assert raw("gunicorn", request(path, Authorization=f"Bearer {variables[name]}")).status == 401, path


@kind("objects of other users")
@pytest.mark.parametrize("way", ["", "/replay", "/cancel"])
@pytest.mark.parametrize("wanted", [str(uuid.UUID(int=0)), "1", "%00", "' OR 1=1--", "*"])
def test_guessed_id_is_not_found(site, key, wanted, way):
    call = requests.post if way else requests.get
    answer = call(f"{site}/api/emails/{wanted}{way}", headers=key, timeout=10)
    assert answer.status_code in (400, 404, 405, 422), answer.text
    assert "Traceback" not in answer.text


# ---- Limits ----


@pytest.fixture
def answers_in_time(site):
    """The web service still answers at the end of the test."""
    yield
    begin = time.monotonic()
    assert requests.get(f"{site}/healthz", timeout=10).status_code == 200
    assert time.monotonic() - begin < 3


DEEP = 100_000
BODIES = {
    "deep lists": b"[" * DEEP,
    "deep objects": b'{"a":' * DEEP,
    "closed deep lists": b"[" * DEEP + b"]" * DEEP,
    "no JSON": b"subject=x&text=y",
    "empty": b" ",
    "null": b"null",
    "number with many digits": b'{"subject": ' + b"9" * 100_000 + b"}",
    "infinite": b'{"subject": 1e999}',
    "NaN": b'{"subject": NaN}',
    "invalid UTF-8": b'{"subject": "\xff\xfe"}',
    "UTF-16": '{"subject": "x"}'.encode("utf-16"),
    "lone surrogate": b'{"subject": "\\ud800", "text": "x", "to": ["a@example.net"]}',
    "null character": b'{"subject": "\\u0000", "text": "x", "to": ["a@example.net"]}',
    "unknown fields": json.dumps({f"field{number}": 1 for number in range(10_000)}).encode(),
    "prototype": b'{"__proto__": {"admin": true}, "constructor": {}, "__class__": "x"}',
    "list instead of an object": b'[{"subject": "x"}]',
    "gzip": bytes.fromhex("1f8b0800000000000003ab560200") + b"\0" * 100,
}


@kind("body and JSON limits")
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bad_body_is_refused_with_a_short_answer(raw, key, body, answers_in_time, journal):
    answer = raw("nginx", request("/api/emails", "POST", body, **key, Content_Type="application/json"), silence=10)
    assert answer.status in (400, 413, 422), answer.data[:300]
    # If the answer listed 10,000 problems, attackers could cause much traffic with small requests.
    assert len(answer.body) < 5 * len(body) + 2000
    assert "Traceback" not in journal("--unit=mailroom-web")


FIELDS = {
    "100,000 empty attachments": {"attachments": [{"filename": "a", "content": ""}] * 100_000},
    "100,000 recipients": {"to": [f"a{number}@example.net" for number in range(100_000)]},
    "10,000 headers": {"headers": {f"X-{number}": "a" for number in range(10_000)}},
    "100,000 reply addresses": {"reply_to": ["a@example.net"] * 100_000},
    "long address": {"to": ["a" * 1_000_000 + "@example.net"]},
    "address that is slow to parse": {"from": "<" * 50_000},
    "quotes that are slow to parse": {"from": '"' + '\\"' * 400 + "<a@example.org>"},
    "many commas": {"reply_to": ["," * 900]},
}


@kind("body and JSON limits")
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_exhausting_field_is_refused_within_seconds(post, fields, answers_in_time):
    begin = time.monotonic()
    answer = post(**fields)
    assert answer.status_code in (413, 422), answer.text[:300]
    assert time.monotonic() - begin < 5
    assert len(answer.text) < 100_000


@kind("body and JSON limits")
@DOORS
@pytest.mark.parametrize("length", [10**8, 10**15, 2**63, 10**30])
def test_announced_size_is_refused_before_it_is_read(raw, key, door, length):
    answer = raw(door, request("/api/emails", "POST", b"", **key, Content_Length=length))
    assert answer.status in (400, 413), answer.data[:200]


# ---- Slow clients ----


@kind("slow clients")
@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: mail.example.org\r\nX-Half: ", id="half a header"),
        pytest.param(b"POST /api/emails HTTP/1.1\r\nHost: mail.example.org\r\nContent-Length: 1000\r\n\r\nhalf", id="half a body"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /static/", id="half a line"),
    ],
)
def test_slow_clients_do_not_stop_others(site, doors, beginning):
    with ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", doors["nginx"]), timeout=10))
            connection.sendall(beginning)
        begin = time.monotonic()
        assert requests.get(f"{site}/healthz", timeout=10).status_code == 200
        assert time.monotonic() - begin < 3


# ---- Logs ----

FORGED = [
    "%0a2026-01-01 INFO emails: accepted",
    "%0d%0aINFO emails: accepted",
    "%1b[31mINFO emails: accepted",
    "%e2%80%a8INFO emails: accepted",
    "%c2%85INFO emails: accepted",
    "%00INFO emails: accepted",
    "%e2%80%aeINFO emails: accepted",
    "%08%08%08INFO emails: accepted",
]


@kind("log forging")
@pytest.mark.parametrize("text", FORGED)
@DOORS
def test_path_forges_no_log_entry(raw, door, text, journal):
    mark = uuid.uuid4().hex
    raw(door, request(f"/{mark}{text.replace(' ', '%20')}"))
    lines = [line for line in journal("--unit=mailroom-web").splitlines() if "emails: accepted" in line]
    # The forged part is on the same line as the rest of the path.
    assert lines == [] or all(mark in line for line in lines)
    assert not any(character in "".join(lines) for character in "\x1b\x08\x85\u2028\u202e\0")


@kind("log forging")
@pytest.mark.parametrize("field", ["User_Agent", "Referer", "X_Request_ID", "X_Forwarded_For", "Authorization", "Cookie"])
def test_header_forges_no_log_entry(raw, field, journal):
    raw("gunicorn", request("/nothing", **{field: "x\x1b[31m INFO emails: accepted 1234"}))
    assert "accepted 1234" not in journal("--unit=mailroom-web")


@kind("log forging")
def test_user_name_forges_no_log_entry(site, journal):
    session = requests.Session()
    page = session.get(f"{site}/login/", timeout=10)
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text).group(1)
    name = "nobody\n2026-01-01 INFO emails: accepted 5678\x1b[31m"
    form = {"csrfmiddlewaretoken": token, "username": name, "password": "wrong"}
    assert session.post(f"{site}/login/", data=form, headers={"Referer": f"{site}/login/"}, timeout=10).status_code == 200
    lines = [line for line in journal("--unit=mailroom-web").splitlines() if "5678" in line]
    assert lines and all("nobody" in line and "\x1b" not in line for line in lines)


# ---- Scripts in pages ----

SCRIPTS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% debug %}",
    "</title><svg onload=alert(1)>",
    "javascript:alert(1)//",
    "' onmouseover='alert(1)",
]


@kind("scripts in pages")
@pytest.mark.parametrize("text", SCRIPTS)
def test_script_in_an_email_is_text(site, post, signed_in, text):
    mark = uuid.uuid4().hex
    number = post(subject=f"{mark} {text}", text=text, html=text).json()["id"]
    pages = {
        path: signed_in.get(f"{site}{path}", timeout=10)
        for path in (f"/?q={mark}", f"/emails/{number}/", f"/admin/emails/email/?q={mark}")
    }
    for path, page in pages.items():
        assert page.status_code == 200, path
        assert mark in page.text, path
        for tag in ("<script>alert", "<img src=x", "<svg onload", "onmouseover='alert"):
            assert tag not in page.text, path
        assert "49" not in re.findall(rf"{mark} (\d+)", page.text)
        assert "script-src 'unsafe-inline'" not in page.headers["Content-Security-Policy"]
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]


@kind("scripts in pages")
@pytest.mark.parametrize("text", SCRIPTS)
def test_script_in_a_search_is_text(site, signed_in, text):
    for name in ("q", "state", "before"):
        page = signed_in.get(f"{site}/", params={name: text}, timeout=10)
        assert page.status_code == 200
        for tag in ("<script>alert", "<img src=x", "<svg onload", "onmouseover='alert"):
            assert tag not in page.text


@kind("scripts in pages")
@pytest.mark.parametrize("path", ["/", "/login/", "/admin/login/", "/missing", "/api/docs"])
def test_page_can_neither_be_framed_nor_sniffed(site, path):
    headers = requests.get(f"{site}{path}", timeout=10).headers
    assert headers["X-Frame-Options"] == "DENY" or "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "unsafe-inline" not in headers["Content-Security-Policy"] and "unsafe-eval" not in headers["Content-Security-Policy"]
    assert not re.search(r"\d", headers.get("Server", "")), headers["Server"]
