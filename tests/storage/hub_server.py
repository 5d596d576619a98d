"""A stand-in for the API of the Hugging Face hub, which keeps files in memory."""

import base64
import contextlib
import hashlib
import io
import json
import threading

import flask
import werkzeug.serving

TOKEN = "hf_" + "a" * 34


class Hub:
    """Repositories by (type, name), each file name -> bytes, and the requests."""

    def __init__(self):
        self.files = {}
        self.requests = []
        self.url = ""

    def commit_of(self, key):
        listed = sorted((n, hashlib.sha1(d).hexdigest()) for n, d in self.files[key].items())
        return hashlib.sha1(json.dumps(listed).encode()).hexdigest()

    def entries(self, key, under=""):
        """Returns the files and folders below a folder."""
        found, prefix = {}, f"{under}/" if under else ""
        for name, data in sorted(self.files[key].items()):
            if name.startswith(prefix):
                oid = hashlib.sha1(data).hexdigest()
                found[name] = {"type": "file", "path": name, "size": len(data), "oid": oid}
                if "/" in name.removeprefix(prefix):
                    parent = name.rpartition("/")[0]
                    found.setdefault(parent, {"type": "directory", "path": parent, "oid": oid})
        return list(found.values())


@contextlib.contextmanager
def serving():
    hub = Hub()
    server = werkzeug.serving.make_server("127.0.0.1", 0, app_of(hub), threaded=True)
    hub.url = f"http://127.0.0.1:{server.port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def refuse(status, code, text):
    return {"error": text}, status, {"X-Error-Code": code, "X-Error-Message": text}


def app_of(hub):
    """Returns the server's application, whose paths are those of the hub."""
    app = flask.Flask(__name__)
    repository = "/api/<any(model, dataset):kind>s/<owner>/<name>"

    @app.before_request
    def check():
        request = flask.request
        hub.requests.append((request.method, request.path))
        is_open = request.method != "POST" or "/paths-info/" in request.path
        is_open &= request.path != "/api/whoami-v2"
        if not is_open and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return refuse(401, "Unauthorized", "Invalid username or password.")

    @app.errorhandler(KeyError)
    def missing(_):
        return refuse(404, "RepoNotFound", "Repository not found")

    @app.get("/api/whoami-v2")
    def whoami():
        return {"type": "user", "name": "somebody", "auth": {}}

    @app.get("/<owner>/<name>/resolve/<revision>/<path:path>", defaults={"of": "model"})
    @app.get("/datasets/<owner>/<name>/resolve/<revision>/<path:path>", defaults={"of": "dataset"})
    def resolve(of, owner, name, revision, path):
        data = hub.files.get((of, f"{owner}/{name}"), {}).get(path)
        if data is None:
            return refuse(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha1(data).hexdigest()
        answer = flask.send_file(io.BytesIO(data), download_name="file", etag=etag)
        answer.headers["X-Repo-Commit"] = hub.commit_of((of, f"{owner}/{name}"))
        return answer

    @app.get(repository)
    @app.get(f"{repository}/revision/<revision>")
    def about(kind, owner, name, revision=""):
        key = kind, f"{owner}/{name}"
        names = [{"rfilename": name} for name in sorted(hub.files[key])]
        return {"id": key[1], "sha": hub.commit_of(key), "siblings": names, "private": False}

    @app.get(f"{repository}/tree/<revision>")
    @app.get(f"{repository}/tree/<revision>/<path:path>")
    def tree(kind, owner, name, revision, path=""):
        return hub.entries((kind, f"{owner}/{name}"), path)

    @app.post(f"{repository}/paths-info/<revision>")
    def paths_info(kind, owner, name, revision):
        wanted = flask.request.form.getlist("paths")
        return [e for e in hub.entries((kind, f"{owner}/{name}")) if e["path"] in wanted]

    @app.post("/api/repos/create")
    def create():
        asked = flask.request.json
        name = f"{asked['organization']}/{asked['name']}"
        hub.files.setdefault((asked.get("type", "model"), name), {})
        return {"url": f"{hub.url}/{name}"}

    @app.post("/api/validate-yaml")
    def validate():
        return {"errors": [], "warnings": []}

    @app.post(f"{repository}/preupload/<revision>")
    def preupload(kind, owner, name, revision):
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in flask.request.json["files"]
        ]
        return {"files": files}

    @app.post(f"{repository}/commit/<revision>")
    def commit(kind, owner, name, revision):
        key = kind, f"{owner}/{name}"
        for line in map(json.loads, flask.request.data.splitlines()):
            if line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                hub.files[key][line["value"]["path"]] = data
        oid = hub.commit_of(key)
        url = f"{hub.url}/{owner}/{name}/commit/{oid}"
        return {"commitUrl": url, "commitOid": oid, "pullRequestUrl": None}

    return app
