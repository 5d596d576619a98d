"""A stand-in for the API of the Hugging Face hub, which keeps files in memory."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "a" * 34


class Hub:
    """Repositories by (type, name), each file name -> bytes, and the commit messages."""

    def __init__(self):
        self.files = {}
        self.messages = []
        self.requests = []
        self.url = ""

    def commit_of(self, key):
        listed = sorted((n, hashlib.sha1(d).hexdigest()) for n, d in self.files[key].items())
        return hashlib.sha1(json.dumps(listed).encode()).hexdigest()


@contextlib.contextmanager
def serving():
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=None, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code, text):
        self.answer(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if path == "/api/whoami-v2":
            return self.whoami()
        resolve = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if resolve:
            kind = "dataset" if resolve[1] else "model"
            return self.file((kind, resolve[2]), resolve[4])
        about = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree)/(.*))?", path)
        key = about and (about[1], about[2])
        if key not in self.hub.files:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if about[3] == "tree":
            return self.answer(body=self.entries(key, about[4].partition("/")[2]))
        names = [{"rfilename": name} for name in sorted(self.hub.files[key])]
        return self.answer(
            body={"id": key[1], "sha": self.hub.commit_of(key), "siblings": names, "private": False}
        )

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        paths_info = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/paths-info/.*", path)
        if paths_info:
            wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
            found = self.entries((paths_info[1], paths_info[2]), "")
            return self.answer(body=[entry for entry in found if entry["path"] in wanted])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.files.setdefault((asked.get("type", "model"), name), {})
            return self.answer(body={"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(body={"errors": [], "warnings": []})
        kind, name, action = re.fullmatch(
            r"/api/(model|dataset)s/([^/]+/[^/]+)/(preupload|commit)/.*", path
        ).groups()
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(body={"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.hub.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                self.hub.files[kind, name][line["value"]["path"]] = data
        oid = self.hub.commit_of((kind, name))
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return self.answer(body={"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def whoami(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        return self.answer(body={"type": "user", "name": "somebody", "auth": {}})

    def entries(self, key, under):
        """Returns the files and folders below a folder."""
        found, prefix = {}, f"{under}/" if under else ""
        for name, data in sorted(self.hub.files[key].items()):
            if name.startswith(prefix):
                oid = hashlib.sha1(data).hexdigest()
                found[name] = {"type": "file", "path": name, "size": len(data), "oid": oid}
                if "/" in name.removeprefix(prefix):
                    parent = name.rpartition("/")[0]
                    found.setdefault(parent, {"type": "directory", "path": parent, "oid": oid})
        return list(found.values())

    def file(self, key, name):
        data = self.hub.files.get(key, {}).get(name)
        if data is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit_of(key),
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.answer(206, data[start : end + 1], headers)
        return self.answer(200, data, headers)
