"""Who may ask: keys, pages of other sites, and bodies that are too much."""

import socket
import time

import httpx
import openai
import pytest
import webuiapi

from dgq.serving import gate

KEY = "a-key:with~signs"
WANTED = {"prompt": "a cat", "steps": 1}
ROUTES = ("/", "/metrics", "/v1/models", "/sdapi/v1/options", "/openapi.json", "/nowhere")


@pytest.fixture(scope="module")
def locked(start):
    return start(key=KEY)


def test_every_route_but_health_asks_for_the_key(locked):
    for path in ROUTES:
        answer = httpx.get(locked.url + path)
        assert answer.status_code == 401, path
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/interrupt", "/draw"):
        assert locked.post(path, json=WANTED).status_code == 401, path
    assert httpx.get(locked.url + "/health").json()["status"] == "ok"


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Token {KEY}",
        "Basic",
        "Basic %%%",
        "Basic /w==",
        f"Basic {KEY}",
        "Bearer \u00e9",
    ],
)
def test_what_is_no_key(locked, authorization):
    answer = httpx.get(locked.url + "/v1/models", headers={"Authorization": authorization.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_the_clients_ways_of_giving_it(locked):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0)
    assert len(client.images.generate(prompt="a cat", extra_body={"steps": 1}).data) == 1
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    web = webuiapi.WebUIApi(port=locked.port, username="anyone", password=KEY)
    assert web.util_get_sampler_names()[0] == "DDIM"
    assert "<form" in httpx.get(locked.url + "/", auth=("", KEY)).text


def test_a_key_does_not_ask_for_a_name_of_the_host(locked):
    headers = {"Host": "pictures.example", "Authorization": f"Bearer {KEY}", "Origin": "https://pictures.example"}
    assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "", "[::1", "127.0.0.2"]
)
def test_another_name_of_the_host_is_refused(served, host):
    for path in ("/", "/health", "/v1/models"):
        assert httpx.get(served.url + path, headers={"Host": host}).status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:1", "[::1]:{port}"])
def test_names_of_this_machine(served, host):
    headers = {"Host": host.format(port=served.port)}
    assert httpx.get(served.url + "/health", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "http://[", ""]
)
def test_a_page_of_another_site_is_refused(served, origin):
    before = served.drawer._seconds
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/draw", "/sdapi/v1/interrupt"):
        assert served.post(path, json=WANTED, headers={"Origin": origin}).status_code in (400, 403)
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = httpx.options(served.url + "/draw", headers=asked)
    assert answer.status_code in (400, 403)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert served.drawer._seconds == before


def test_the_own_page_is_not(served):
    answer = served.post("/draw", json=WANTED, headers={"Origin": served.url})
    assert answer.status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_form_can_send_is_refused(served, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/options", "/draw"):
        assert served.post(path, content=b'{"prompt": "a cat"}', headers=headers).status_code == 415


def test_a_body_that_is_too_large(served):
    large = b" " * (gate.LARGEST_BODY + 1)
    headers = {"Content-Type": "application/json"}
    assert served.post("/draw", content=large, headers=headers).status_code == 413
    assert served.post("/draw", content=iter([large[:1000]] * 70), headers=headers).status_code == 413
    just = b'{"prompt": ""}'.ljust(gate.LARGEST_BODY)
    assert served.post("/draw", content=just, headers=headers).status_code == 400


def answered(port, sent, seconds=20):
    """The first line that a server answers to bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(sent)
        return connection.makefile("rb").readline().decode()


def test_a_body_that_does_not_come(served, monkeypatch):
    monkeypatch.setattr(gate, "SLOWEST_BODY", 0.2)
    head = f"POST /draw HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
    started = time.monotonic()
    assert " 408 " in answered(served.port, f"{head}Content-Length: 10\r\n\r\n{{".encode())
    assert time.monotonic() - started < 5
    assert not served.drawer._jobs


def test_what_is_no_http(served):
    host = f"Host: 127.0.0.1:{served.port}\r\n"
    assert " 400 " in answered(served.port, b"\x00\x01\x02\r\n\r\n")
    assert " 403 " in answered(served.port, b"GET / HTTP/1.0\r\n\r\n")
    assert " 400 " in answered(served.port, f"POST /draw HTTP/1.1\r\n{host}Content-Length: -1\r\n\r\n".encode())


def test_nothing_is_kept_or_guessed(served):
    for path in ("/", "/v1/models", "/nowhere"):
        headers = httpx.get(served.url + path).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "server" not in headers


def test_head_is_get_without_the_body(served):
    """As monitors ask."""
    for path in ("/", "/health", "/v1/models"):
        head, get = httpx.head(served.url + path), httpx.get(served.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"]
    assert httpx.head(served.url + "/draw").status_code == 405
