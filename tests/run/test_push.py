"""`mm-agrae export --push` as typed, against a hub of a few lines: the client and every request are real."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import TEXT

from mm_agrae.errors import ConfigError
from mm_agrae.run.export import require_hub


class Hub(BaseHTTPRequestHandler):
    """Takes all files inside the commit, as the real one does small ones."""

    def do_GET(self):
        allowed = self.headers.get("authorization") == "Bearer hf_good"
        self.answer({"name": "user", "type": "user", "orgs": []} if allowed else {"error": "Invalid token"}, 401)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        path, known = self.path.split("?")[0], self.server
        if path == "/api/repos/create":
            known.created.append(json.loads(body))
            self.answer({"url": f"{known.address}/user/name"})
        elif path == "/api/validate-yaml":
            known.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif known.full:
            self.answer({"error": "You have no space left"}, 403)
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            known.files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.answer({"commitUrl": f"{known.address}/user/name/commit/1", "commitOid": "1", "success": True})

    def answer(self, value, refusal=200):
        content = json.dumps(value).encode()
        self.send_response(refusal if "error" in value else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.created, server.cards, server.files, server.full = [], [], {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(folder, name, address, token="hf_good", expect=0):
    """The export is in folder/out; returns what was printed."""
    environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder)}
    result = subprocess.run(
        [sys.executable, "-m", "mm_agrae.cli", "export", TEXT, str(folder / "out"), "--push", name],
        capture_output=True, text=True, timeout=300,
        env=os.environ | environment | {"HF_TOKEN": token, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"},
    )  # fmt: skip
    assert result.returncode == expect, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout if expect == 0 else result.stderr.strip().splitlines()[-1]


def test_an_export_is_uploaded_whole(hub, tmp_path):
    assert push(tmp_path, "user/name", hub.address).startswith(f"{hub.address}/user/name  ")
    (made,) = hub.created
    assert (made["organization"], made["name"], made["visibility"]) == ("user", "name", "private")
    out = tmp_path / "out"
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"README.md", "model.safetensors", "generation_config.json", "chat_template.jinja"} <= hub.files.keys()
    assert set(hub.cards) == {(out / "README.md").read_text("utf-8")}  # its front matter is what the hub checks


def test_what_the_hub_refuses_is_said_in_a_line(hub, tmp_path):
    line = push(tmp_path, "user/name", hub.address, token="hf_old", expect=2)
    assert line.startswith("error: --push user/name: ")
    assert "401" in line or "Invalid" in line
    assert not (tmp_path / "out").exists()  # found out before the work
    hub.full = True
    line = push(tmp_path, "user/name", hub.address, expect=2)
    assert "no space left" in line
    assert line.endswith(
        f"the export is in {tmp_path / 'out'}; to try again: hf upload user/name {tmp_path / 'out'} ."
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(("token", "message"), [("hf_good", "http://127.0.0.1:9"), ("", "hf auth login")])
def test_without_network_or_token_there_is_no_export(token, message, tmp_path):
    line = push(tmp_path, "user/name", "http://127.0.0.1:9", token=token, expect=2)
    assert line.startswith("error: --push user/name: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("name", "user/name or organisation/name"), ("user/my name", "must use alphanumeric chars")]
)
def test_a_name_that_is_none_is_refused(name, message):
    with pytest.raises(ConfigError, match=f"--push {name}: .*{message}"):
        require_hub(name)
