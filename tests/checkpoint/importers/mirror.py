"""A mirror of the hub on this machine: folders served as the hub's client asks for them."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMITS = {"main": "1" * 40, "v2": "2" * 40}


def handler(models):
    """``models``: folders by (id, revision)."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                folder = self.find(name, revision)
                if folder is None:
                    return self.missing()
                if parts[4:5] == ["tree"]:
                    tree = [
                        {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": "0" * 40}
                        for p in folder.rglob("*")
                        if p.is_file()
                    ]
                    return self.send(json.dumps(tree).encode(), "application/json", revision, body)
                files = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()]
                found = {"id": name, "modelId": name, "sha": self.commit(revision), "siblings": files}
                return self.send(json.dumps(found).encode(), "application/json", revision, body)
            if len(parts) > 4 and parts[2] == "resolve":
                folder = self.find("/".join(parts[:2]), parts[3])
                path = None if folder is None else folder.joinpath(*parts[4:])
                if path is not None and path.is_file():
                    return self.send(path.read_bytes(), "application/octet-stream", parts[3], body)
            return self.missing()

        def commit(self, revision):
            return COMMITS.get(revision, revision)

        def find(self, name, revision):
            wanted = self.commit(revision)
            return next((x for (n, r), x in models.items() if n == name and COMMITS[r] == wanted), None)

        def missing(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, data, kind, revision, body):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", self.commit(revision))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    return Handler


@contextmanager
def mirror(models):
    """The address of a mirror with these models."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(models))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
