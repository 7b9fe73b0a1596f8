"""--init and --ckpt take the name of a model on a hub: here a small server on loopback."""
import hashlib
import http.server
import json
import threading

import pytest
import torch

import sample
import train_sft
from checkpoint import from_hub, load_model

SHA = "1" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """What a download asks for: what the newest version is, the list of its files, each file."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.seen.append(self.path)
        files = {path.name: path for path in self.server.folder.iterdir()}
        resolved = self.path.split(f"/resolve/{SHA}/")
        if self.path.startswith("/api/models/owner/tiny/revision/"):
            listed = {"id": "owner/tiny", "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
            self.answer(json.dumps(listed).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith(f"/api/models/owner/tiny/tree/{SHA}"):
            listed = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": name}
                      for name, path in files.items()]
            self.answer(json.dumps(listed).encode(), {"Content-Type": "application/json"})
        elif len(resolved) == 2 and resolved[0] == "/owner/tiny" and resolved[1] in files:
            data = files[resolved[1]].read_bytes()
            self.answer(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA})
        else:
            self.answer(b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, 404)

    def answer(self, body, headers, status=200):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(model_dir, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.seen = model_dir, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_on_the_hub_is_loaded_and_tuned(hub, model_dir, pairs_file, tmp_path, capsys, refused):
    (model, _), (expected, _) = load_model("owner/tiny"), load_model(model_dir)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    sample.main(["--ckpt", "owner/tiny", "--prompt", "小猫", "--max-new-tokens", "3", "--device", "cpu"])
    assert "owner/tiny:" in capsys.readouterr().err
    train_sft.main(["--init", "owner/tiny", "--data", str(pairs_file), "--out", str(tmp_path / "run"), "--max-steps",
                    "1", "--device", "cpu"])
    assert load_model(tmp_path / "run")[0].config == expected.config
    assert json.loads((tmp_path / "run" / "args.json").read_text())["init"] == "owner/tiny"
    refused(sample.main, ["--ckpt", "owner/none", "--prompt", "x"], "owner/none", "no such folder", "HF_ENDPOINT")


def test_only_what_can_be_a_name_is_looked_up(hub, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("out/sfft", "sft", "a/b/c", str(tmp_path / "x"), "../x", "./x"):
        refused(sample.main, ["--ckpt", name, "--prompt", "x"], "no model directory")
    assert not hub.seen
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        from_hub("owner/tiny")
