"""A server on the loopback with the few routes of the Hugging Face hub that an upload and a download of files need."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_its_owner"


class Server:
    """Repositories, by name: whether they are private, and the files of each commit."""

    def __init__(self):
        self.private, self.commits, self.requests = {}, {}, []

    def add(self, repository, files, private=False):
        """A commit of files {path: bytes}."""
        self.private.setdefault(repository, private)
        commit = hashlib.sha1(repr((len(self.commits.get(repository, {})), sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        return commit

    def commit_of(self, repository, revision):
        commits = self.commits[repository]
        return list(commits)[-1] if revision == "main" else revision if revision in commits else None

    def files(self, repository, revision="main"):
        return self.commits[repository][self.commit_of(repository, revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body waits 40 ms for the acknowledgement of its headers

    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        own, path = self.server.own, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        own.requests.append((self.command, path, self.headers.get("User-Agent", "")))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), allowed)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/]+))?(?:/.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repository, revision = (api or file)[1], (api[3] or "main") if api else file[2]
        if repository not in own.commits or (own.private[repository] and not allowed):
            return self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        commit = own.commit_of(repository, revision) if own.commits[repository] else "0" * 40
        if commit is None:
            return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        files = own.commits[repository].get(commit, {})
        if file:
            content = files[file[3]]
            return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        if api[2] == "tree":
            rows = [(name, content, hashlib.sha1(content).hexdigest()) for name, content in files.items()]
            return self.answer([{"type": "file", "path": n, "size": len(c), "oid": oid} for n, c, oid in rows])
        if api[2] == "preupload":
            rows = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": r["path"], "uploadMode": "regular", "shouldIgnore": False} for r in rows]}
            )
        if api[2] == "commit":
            return self.commit(repository, dict(files), body)
        siblings = [{"rfilename": name} for name in files]
        return self.answer({"id": repository, "sha": commit, "siblings": siblings, "private": own.private[repository]})

    do_GET = do_HEAD = do_POST = handle_request

    def create(self, asked, allowed):
        own, repository = self.server.own, f"{asked.get('organization') or 'user'}/{asked['name']}"
        if not allowed:
            return self.answer({"error": "Invalid username or password."}, 401)
        if repository in own.commits:
            return self.answer({"error": "You already created this model repo", "url": self.url(repository)}, 409)
        own.commits[repository], own.private[repository] = (
            {},
            asked.get("visibility") == "private" or bool(asked.get("private")),
        )
        return self.answer({"url": self.url(repository), "name": repository, "id": repository})

    def commit(self, repository, files, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        commit = self.server.own.add(repository, files)
        address = f"{self.url(repository)}/commit/{commit}"
        return self.answer({"success": True, "commitOid": commit, "commitUrl": address})

    def url(self, repository):
        return f"http://{self.headers['Host']}/{repository}"


@contextmanager
def serve():
    """The server and its address."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.own, http.daemon_threads = Server(), True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield http.own, f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
