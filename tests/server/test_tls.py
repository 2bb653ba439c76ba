"""HTTPS, and keys that are read again, on a server in its own process."""

import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import httpx
import pytest

from tests.hostile.wire import head, read_all
from tests.server.conftest import KEY
from tests.server.process import Server

OTHER = "o" * 20


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return cert, key


@pytest.mark.slow
def test_https_and_key_file(tiny_checkpoint, certificate, tmp_path):
    cert, key = certificate
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    flags = ("--ssl-certfile", str(cert), "--ssl-keyfile", str(key), "--api-keys-file", str(keys))
    server = Server(tiny_checkpoint, tmp_path / "log", *flags, "--head-timeout-s", "1")
    try:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=server.url, verify=context, timeout=20) as client:

            def status(given):
                return client.get("/version", headers={"authorization": f"Bearer {given}"}).status_code

            body = {"prompt": "w1", "max_new_tokens": 2}
            answer = client.post("/generate", json=body, headers={"authorization": f"Bearer {KEY}"})
            assert answer.status_code == 200
            keys.write_text(OTHER)
            server.process.send_signal(signal.SIGHUP)
            server.until(lambda: status(OTHER) == 200)
            assert status(KEY) == 401
        host, port = server.url.removeprefix("https://").split(":")
        # A response that comes before the end of its request arrives, and then the connection closes.
        plain = socket.create_connection((host, int(port)), timeout=20)
        with context.wrap_socket(plain, server_hostname=host) as connection:
            connection.sendall(head("/generate", "content-length: 100000") + b" " * 1000)
            answered = read_all(connection)
        assert answered.startswith(b"HTTP/1.1 401")
        assert b"invalid_api_key" in answered
        # A handshake that does not begin.
        started = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=20) as silent:
            assert silent.recv(1) == b""
        assert time.monotonic() - started < 10
        assert server.stop() == 0
    finally:
        server.kill()


@pytest.mark.slow
def test_certificate_without_key(certificate):
    command = [sys.executable, "-m", "slr_server.cli", "--port", "0", "--log-level", "error"]
    done = subprocess.run([*command, "--ssl-certfile", str(certificate[0])], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("slr-serve: error: ssl_certfile, ssl_keyfile: ")
