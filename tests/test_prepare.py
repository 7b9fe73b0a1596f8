"""data/prepare.py, against a hub of its own on loopback, which misbehaves on demand."""
import hashlib
import http.server
import io
import json
import random
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from conftest import ROOT, STORIES, random_model, tiny_config

import pretrain
from checkpoint import save_model, save_tokenizer
from data import prepare
from records import place

HUB = f"/datasets/{prepare.REPOSITORY}/resolve/main/{prepare.ARCHIVE}"


def row(n, text):
    return {"story": f"A cat. {n}", "story_zh": text, "summary": "A cat.", "source": "GPT-4",
            "instruction": {"prompt:": "Write a story.", "words": ["cat"], "features": ["Dialogue"]}}


def pack(files):
    """{name: content} -> tar.gz as bytes. Not well packed, so that it has some length."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=0) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
    return out.getvalue()


def dump(*rows):
    return json.dumps(rows, ensure_ascii=False)


def lines(*rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


ROWS = [row(n, text) for n, text in enumerate(STORIES)]
FILES = {"data/data00.json": dump(*ROWS[:50]), "data/._data00.json": "junk", "data/README.md": "# stories",
         "data/data01.jsonl": lines(*ROWS[50:])}
ARCHIVE = pack(FILES)


class Hub(http.server.BaseHTTPRequestHandler):
    """HEAD and a redirect with X-Linked-* as the hub has them, Range behind it; server.mode is what goes wrong."""
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        hub.seen.append((self.command, self.path, self.headers.get("Range")))
        if self.path == HUB and hub.mode == "page":
            self.answer(200, b"<html>log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        elif self.path == HUB:
            self.answer(302, b"moved", {"Location": f"{hub.cdn}/cdn/blob?signed=1", "X-Linked-Size": str(len(ARCHIVE)),
                                        "X-Linked-Etag": f'"{hashlib.sha256(ARCHIVE).hexdigest()}"', "ETag": '"git"',
                                        "X-Repo-Commit": "0" * 40})
        elif self.path.startswith("/cdn/"):
            start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
            headers = {"Content-Range": f"bytes {start}-{len(ARCHIVE) - 1}/{len(ARCHIVE)}"} if start else {}
            self.answer(206 if start else 200, ARCHIVE[start:], headers)
        else:
            self.answer(404, b"nothing")

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "binary/octet-stream", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.drops and status in (200, 206):
            self.server.drops -= 1
            body = body[:len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.mode, server.drops, server.seen = "", 0, []
    server.url, server.cdn = (f"http://{name}:{server.server_port}" for name in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tokenizer_dir(tok, tmp_path):
    path = tmp_path / "tokenizer"
    path.mkdir()
    save_tokenizer(path, tok)
    return path


@pytest.fixture
def run(tokenizer_dir, tmp_path):
    """run(*argv) -> --out, prepared from these sources."""
    def run(*argv, out="out"):
        prepare.main([*map(str, argv), "--out", str(tmp_path / out), "--tokenizer", str(tokenizer_dir)])
        return tmp_path / out
    return run


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(ARCHIVE)
    return path


def manifest(out):
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def told(tok, out, side):
    """The stories of a token file."""
    ids = np.fromfile(out / f"{side}.bin", manifest(out)["dtype"])
    assert ids[-1] == tok.eos_id
    return [tok.decode(part.tolist()).strip() for part in np.split(ids, np.flatnonzero(ids == tok.eos_id) + 1)[:-1]]


def file_of(path, rows):
    path.write_text(lines(*rows), encoding="utf-8")
    return path


# ---- from archive to tokens ----

def test_tinystories_from_the_hub(hub, run, tok, tmp_path):
    out = run(prepare.TINYSTORIES)
    train, val = told(tok, out, "train"), told(tok, out, "val")
    assert sorted(train + val) == sorted(STORIES)
    assert train == [text for text in STORIES if text not in val]  # in their order
    assert val == [text for text in STORIES if place(text) < manifest(out)["held_out_below"]]
    m = manifest(out)
    assert m["stories"] == {"train": len(train), "val": max(1, len(STORIES) // 20)}
    assert m["characters"] == sum(map(len, STORIES)) and m["dtype"] == "uint16" and m["vocab_size"] == tok.vocab_size
    file, sha256 = tmp_path / "downloads" / prepare.ARCHIVE, hashlib.sha256(ARCHIVE).hexdigest()
    assert m["sources"] == [{"source": f"{hub.url}/datasets/{prepare.REPOSITORY}", "file": str(file),
                             "size": len(ARCHIVE), "sha256": sha256, "rows": len(STORIES), "rejected": 0}]
    assert file.read_bytes() == ARCHIVE
    for name, digest in m["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert m["command"].startswith("python data/prepare.py tinystories-zh --out ")
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "rejected.jsonl", "tokenizer.json",
                                                     "tokenizer.model", "tokenizer_config.json", "train.bin", "val.bin"]
    loads = [("GET", "/cdn/blob?signed=1", None)]
    assert [seen for seen in hub.seen if seen[:2] == loads[0][:2]] == loads
    run(prepare.TINYSTORIES, "--sha256", sha256.upper(), out="again")
    assert [seen for seen in hub.seen if seen[:2] == loads[0][:2]] == loads  # not downloaded twice
    assert (tmp_path / "again/train.bin").read_bytes() == (out / "train.bin").read_bytes()


def test_what_is_held_out_hangs_on_the_story_alone(run, tok, tmp_path):
    rows = [{"text": text, "features": ["对话"]} for text in STORIES] * 2
    rows += [{"text": text.replace("。", " 。"), "story_id": "x"} for text in STORIES]  # the same stories to `place`
    one = run(file_of(tmp_path / "a.jsonl", rows), "--val-stories", 7, out="one")
    random.Random(1).shuffle(rows)
    two = run(file_of(tmp_path / "a.jsonl", rows[:100]), file_of(tmp_path / "b.jsonl", rows[100:]), "--val-stories", 7,
              out="two")
    for side in ("train", "val"):
        assert sorted(told(tok, one, side)) == sorted(told(tok, two, side))
    val = {text.replace(" ", "") for text in told(tok, one, "val")}
    assert len(val) == 3 and len(told(tok, one, "val")) == 9  # 7 asked for, and the other copies
    assert not val & {text.replace(" ", "") for text in told(tok, one, "train")}
    assert manifest(one)["held_out_below"] == manifest(two)["held_out_below"]


def test_many_batches_give_the_same_bytes(run, tmp_path, monkeypatch):
    source = file_of(tmp_path / "a.jsonl", ROWS)
    one = run(source, out="one")
    monkeypatch.setattr(prepare, "BATCH", 7)
    two = run(source, out="two")
    assert manifest(one)["sha256"] == manifest(two)["sha256"]


def test_tokens_are_those_of_the_tokenizer_and_as_wide_as_it(tok, monkeypatch):
    texts = [*STORIES[:3], "它说▁你好▁。▁", "▁", "a b 🐈\n"]  # a literal ▁ does not become a space

    def rows(dtype):
        return [np.array([*tok.encode(text), tok.eos_id], dtype).tobytes() for text in texts]
    assert list(prepare.tokenize(tok, texts)) == rows(np.uint16)
    monkeypatch.setattr(tok, "vocab_size", 70_000)
    assert list(prepare.tokenize(tok, texts)) == rows(np.uint32)


def test_rows_that_are_no_stories_are_listed(run, tok, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    good = lines(*ROWS[:30])
    bad = ['{"story_zh": 3}', '{"summary": "x"}', '{"story_zh": "\\ud83d"}', "[1]", '{"story_zh": " "}', "{broken"]
    path.write_text(good + "\n".join(bad) + "\n" + lines(*ROWS[30:60]), encoding="utf-8")
    out = run(path)
    listed = [json.loads(line) for line in open(out / "rejected.jsonl", encoding="utf-8")]
    assert [r["row"] for r in listed] == list(range(31, 37)) and {r["file"] for r in listed} == {str(path)}
    for r, word in zip(listed, ("int", "story_zh", "surrogate", "list", "empty", "not JSON")):
        assert word in r["reason"]
    assert manifest(out)["sources"][0]["rejected"] == 6 and manifest(out)["sources"][0]["rows"] == 66
    assert sorted(told(tok, out, "train") + told(tok, out, "val")) == sorted(STORIES[:60])
    said = capsys.readouterr()
    assert "row 31" in said.err and "row 36" not in said.err and "6 rows rejected" in said.out


def test_instructions_are_made_of_the_same_rows(archive, run):
    out = run(archive, "--instructions")
    assert (out / "instructions/train.jsonl").is_file() and (out / "manifest.json").is_file()
    for name, below in (("train", False), ("val", True)):
        for line in open(out / "instructions" / f"{name}.jsonl", encoding="utf-8"):
            record = json.loads(line)
            assert record["output"] in STORIES and (place(record["output"]) < manifest(out)["held_out_below"]) == below
    assert {p.name for p in out.iterdir()} >= {"train.bin", "instructions"} and not (out / "rows.jsonl").exists()


def test_what_augment_is_given(archive, run, tmp_path, monkeypatch):
    import augment

    def look(args):
        rows = [json.loads(line) for line in open(args.files[0], encoding="utf-8")]
        assert [r["text"] for r in rows] == STORIES and rows[0]["features"] == ["Dialogue"]
        assert rows[-1]["story_id"].endswith(f"data/data01.jsonl:{len(STORIES) - 50}")
        assert args.extract == ("words", "sentence") and args.out.name == "instructions"
        assert not (tmp_path / "out").exists()
        (tmp_path / "threshold").write_text(repr(args.val_fraction))

    monkeypatch.setattr(augment, "augment", look)
    out = run(archive, "--instructions")
    assert float((tmp_path / "threshold").read_text()) == manifest(out)["held_out_below"]


def test_instructions_that_cannot_be_made_leave_nothing(run, tmp_path, capsys):
    rows = [{"text": f"{n}"} for n in range(40)]  # nothing to ask for
    with pytest.raises(SystemExit):
        run(file_of(tmp_path / "a.jsonl", rows), "--instructions")
    assert "no usable row" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- the download ----

def test_a_dropped_connection_goes_on_where_it_was(hub, run, tok, monkeypatch):
    hub.drops = 1
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    out = run(prepare.TINYSTORIES)
    assert len(told(tok, out, "train")) > 90 and manifest(out)["sources"][0]["size"] == len(ARCHIVE)
    ranges = [asked for command, path, asked in hub.seen if command == "GET" and path.startswith("/cdn/")]
    assert len(ranges) == 2 and ranges[1] == f"bytes={len(ARCHIVE) // 2 // 1000 * 1000}-"


def test_a_wrong_endpoint_is_one_line(hub, run, tmp_path, capsys):
    for endpoint, word in (("http://127.0.0.1:1", "refused"), ("hf-mirror.example", "protocol"),
                           (hub.url + "/nowhere/", "404"), (hub.url, "Hub")):
        hub.mode = "page"
        with pytest.raises(SystemExit) as e:
            run(prepare.TINYSTORIES, "--endpoint", endpoint)
        last = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2 and word in last, last
        assert endpoint.rstrip("/") in last and "--endpoint" in last and "HF_ENDPOINT" in last
    assert not (tmp_path / "out").exists() and not list((tmp_path / "downloads").glob("*.gz"))


def test_without_huggingface_hub(run, refused, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(prepare.main, [prepare.TINYSTORIES, "--out", tmp_path / "out", "--tokenizer", tokenizer_dir],
            "pip install huggingface_hub")


# ---- user errors ----

@pytest.mark.parametrize("content, words", [
    (ARCHIVE[:len(ARCHIVE) // 2], ["not a whole tar.gz"]),
    (ARCHIVE[:-4], ["not a whole tar.gz"]),  # after the last row
    (ARCHIVE[:-8] + bytes(8), ["not a whole tar.gz", "CRC"]),
    (b"\x1f\x8bjunk", ["not a whole tar.gz"]),
    (pack({"readme.txt": "x"}), ["no story"]),
    (b"PK\x03\x04 zip", ["is a zip file"]),
    ((dump(*ROWS) + dump(*ROWS)).encode(), ["follows the end of the list"]),
    (dump(*ROWS).encode()[:-9], ["not JSON"]),
    (pack({"data00.json": dump(*ROWS), "data01.json": dump(*ROWS)[:-9]}), ["data01.json is not JSON"]),
    (b'{"title": "x", "contents": "y"}\n' * 3, ["row 1 has no 'story_zh'"]),
    (b"", ["no story"]),
    (lines(*ROWS).encode("utf-16"), ["row 1 is not UTF-8"]),
    (lines(ROWS[0], ROWS[0]).encode(), ["none is left"]),
])
def test_files_that_will_not_do(content, words, tokenizer_dir, tmp_path, capsys):
    path = tmp_path / "source"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as e:
        prepare.main([str(path), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and all(word in last for word in words), last
    assert not (tmp_path / "out").exists()


def test_bad_flags(run, refused, tokenizer_dir, tmp_path):
    source = file_of(tmp_path / "a.jsonl", ROWS)
    out = run(source)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    argv = [source, "--tokenizer", tokenizer_dir, "--out"]
    refused(prepare.main, [*argv, out], "--out", "--overwrite")
    refused(prepare.main, [tmp_path / "nowhere.jsonl", *argv[1:], tmp_path / "new"], "nowhere.jsonl")
    refused(prepare.main, [source, "--out", tmp_path / "new", "--tokenizer", tmp_path], "tokenizer.model")
    refused(prepare.main, [*argv, tmp_path / "new", "--sha256", "0" * 64], "--sha256", source)
    refused(prepare.main, [*argv, tmp_path / "new", "--sha256", "0"], "--sha256")
    refused(prepare.main, [*argv, tmp_path / "new", "--val-stories", "0"], "--val-stories")
    refused(prepare.main, ["--out", tmp_path / "new"], "--tokenizer")
    refused(prepare.main, [*argv, tokenizer_dir, "--overwrite"], tokenizer_dir, "is not replaced")
    refused(prepare.main, [*argv, source / "new"], "cannot write to", source)
    for url in ("https://example.com/a/stories.tar.gz", "http://127.0.0.1:1/x.jsonl"):
        refused(prepare.main, [url, *argv[1:], tmp_path / "new"], url, "download it first")
    assert not (tmp_path / "new").exists() and before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_run_that_fails_leaves_the_old_data(run, tmp_path):
    out = run(file_of(tmp_path / "a.jsonl", ROWS))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "b.tar.gz").write_bytes(ARCHIVE[:40_000])
    with pytest.raises(SystemExit):
        run(tmp_path / "b.tar.gz", "--overwrite")
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "tokenizer.json").write_text("of another tokenizer")
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    run(tmp_path / "a.jsonl", "--overwrite")
    assert not (out / "tokenizer.json").exists() and manifest(out)["sha256"] == json.loads(
        before["manifest.json"])["sha256"]


def test_help():
    done = subprocess.run([sys.executable, "data/prepare.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--endpoint" in done.stdout


# ---- pretrain.py ----

def test_pretrain_reads_what_prepare_writes(run, tok, tmp_path, refused, capsys):
    data = run(file_of(tmp_path / "a.jsonl", ROWS))
    argv = ["--data", str(data), "--max-steps", "2", "--block-size", "64", "--batch-size", "2", "--device", "cpu"]
    pretrain.main([*argv, "--out", str(tmp_path / "run")])
    n = manifest(data)["stories"]["train"]
    assert f"{n} stories to train on" in capsys.readouterr().out
    assert (tmp_path / "run/tokenizer.model").read_bytes() == tok.files["tokenizer.model"]
    assert not (tmp_path / "run/tokens").exists()
    with open(tmp_path / "run/log.jsonl") as f:
        assert any("val_loss" in line for line in f)
    assert pretrain.open_tokens(data, manifest(data), tok)[0].dtype == np.uint16
    pretrain.main([*argv[:3], "4", *argv[4:], "--out", str(tmp_path / "run"), "--resume"])
    pretrain.main([*argv, "--out", str(tmp_path / "next"), "--init", str(tmp_path / "run")])

    other = pretrain.train_tokenizer(STORIES, 300)
    save_model(tmp_path / "other", random_model(tiny_config(other.vocab_size)), other)
    for flag in ("--init", "--tokenizer"):
        refused(pretrain.main, [*argv, "--out", tmp_path / "new", flag, tmp_path / "other"], data, "tokenizer", flag)
    refused(pretrain.main, [*argv, "--out", tmp_path / "new", "--val-data", tmp_path / "a.jsonl"], "--val-data")
    (data / "train.bin").write_bytes((data / "train.bin").read_bytes()[:-2])
    refused(pretrain.main, [*argv, "--out", tmp_path / "new"], "train.bin", data)
    for content in ("{", "[1]", '{"name": "app"}'):
        (data / "manifest.json").write_text(content)
        refused(pretrain.main, [*argv, "--out", tmp_path / "new"], "manifest.json")
    assert not (tmp_path / "new").exists()
