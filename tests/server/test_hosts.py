import pytest

from slr_server.hosts import HostCheck, allowed_hosts
from slr_server.settings import ServerSettings
from tests.hostile.wire import connect, read_response


def allows(host, /, **settings):
    allowed = allowed_hosts(ServerSettings(**settings))
    return allowed is None or HostCheck(lambda *_: None, allowed)._allows(host)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:1", "[::1]:8000", "10.0.0.1", "server", "a.localhost."])
def test_loopback_allows(host):
    assert allows(host)
    assert allows(host, host="::1")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "a.local", "[::1"])
def test_loopback_refuses(host):
    assert not allows(host)
    assert not allows(host, host="localhost")
    assert allows(host, host="0.0.0.0")
    assert allows(host, allowed_hosts="*")


def test_configured():
    names = {"allowed_hosts": "api.example, Other.example"}
    assert allows("API.example:443", **names)
    assert allows("other.example", **names)
    assert not allows("localhost", **names)


def test_process(guarded):
    for path, status in (("/livez", 200), ("/version", 421)):
        with connect(guarded.url) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: evil.example\r\n\r\n".encode())
            got, headers, body = read_response(connection)
            assert got == status
            assert headers["x-request-id"]
            assert status == 200 or b"unknown_host" in body
