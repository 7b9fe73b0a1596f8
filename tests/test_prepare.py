"""data/prepare.py against a hub of its own on loopback, which misbehaves on demand."""
import hashlib
import http.server
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from conftest import ROOT, STORIES, random_model, tiny_config

import pretrain
from checkpoint import save_model
from data import download, prepare
from records import place

HUB = "/" + prepare.TINYSTORIES_PATH


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
OTHER = pack({name: content.replace("小猫", "小鸡") for name, content in FILES.items()})  # of the same size


class Hub(http.server.BaseHTTPRequestHandler):
    """HEAD and a redirect with X-Linked-* as the hub has them, Range behind it; server.mode is what goes wrong."""
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        hub.seen.append((self.command, self.path, dict(self.headers)))
        body, etag = hub.body, hub.etag
        if self.path == HUB and hub.mode == "page":
            self.answer(200, b"<html>log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        elif self.path == HUB and hub.mode != "404":
            self.answer(302, b"moved", {"Location": "/cdn/blob?signed=1", "X-Linked-Size": str(len(body)),
                                        "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "ETag": '"git"'})
        elif self.path.startswith(("/cdn/", "/plain/")):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            if hub.mode == "no range" or self.headers.get("If-Range", etag) != etag:
                start = 0
            if start >= len(body):
                self.answer(416, b"")
                return
            if hub.mode == "corrupted":
                body = body[:500] + b"?" + body[501:]
            headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
            self.answer(206 if start else 200, body[start:], {"ETag": etag, **headers})
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
        self.server.sent += len(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.body, server.etag, server.mode, server.drops, server.seen, server.sent = ARCHIVE, '"v1"', "", 0, [], 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(download, "WAIT", 0)
    monkeypatch.setattr(prepare, "DOWNLOADS", tmp_path / "downloads")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tokenizer_dir(tok, tmp_path):
    path = tmp_path / "tokenizer"
    path.mkdir()
    tok.save(path)
    return path


@pytest.fixture
def run(tokenizer_dir, tmp_path):
    """run(*argv) -> --out, prepared from these sources."""
    def run(*argv, out="out"):
        prepare.main([*map(str, argv), "--out", str(tmp_path / out), "--tokenizer", str(tokenizer_dir)])
        return tmp_path / out
    return run


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
    file, sha256 = tmp_path / "downloads/TinyStories_all_data_zh.tar.gz", hashlib.sha256(ARCHIVE).hexdigest()
    assert m["sources"] == [{"source": hub.url + HUB, "file": str(file), "size": len(ARCHIVE), "sha256": sha256,
                             "rows": len(STORIES), "rejected": 0}]
    for name, digest in m["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert m["command"].startswith("python data/prepare.py tinystories-zh --out ")
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "rejected.jsonl", "tokenizer.json",
                                                     "tokenizer.model", "tokenizer_config.json", "train.bin", "val.bin"]
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["TinyStories_all_data_zh.tar.gz"]
    sent = hub.sent
    run(prepare.TINYSTORIES, out="again")
    assert hub.sent - sent < 100  # not downloaded twice
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


def test_many_batches_and_pieces_give_the_same_bytes(run, tmp_path, monkeypatch):
    source = file_of(tmp_path / "a.jsonl", ROWS)
    one = run(source, out="one")
    monkeypatch.setattr(prepare, "BATCH", 300)
    monkeypatch.setattr(prepare, "SPLIT", 7)
    two = run(source, out="two")
    assert manifest(one)["sha256"] == manifest(two)["sha256"]


def test_a_wide_vocabulary(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(tok, "vocab_size", 70_000)
    monkeypatch.setattr(prepare, "tokenizer", tok, raising=False)
    places, lengths, tokens = prepare.tokenize(STORIES[:3])
    assert tokens.dtype == np.uint32 and places.tolist() == [place(text) for text in STORIES[:3]]
    tokens.tofile(tmp_path / "all.bin")
    prepare.split(tmp_path / "all.bin", tok.dtype, places, lengths, 0.0)
    assert (tmp_path / "train.bin").read_bytes() == tokens.tobytes()


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


def test_instructions_are_made_of_the_same_rows(hub, run, tmp_path):
    pytest.importorskip("augment")
    out = run(prepare.TINYSTORIES, "--instructions")
    assert (out / "instructions/train.jsonl").is_file() and (out / "manifest.json").is_file()
    for name, below in (("train", False), ("val", True)):
        for line in open(out / "instructions" / f"{name}.jsonl", encoding="utf-8"):
            record = json.loads(line)
            assert record["output"] in STORIES and (place(record["output"]) < manifest(out)["held_out_below"]) == below


def test_what_augment_is_given(hub, run, tmp_path, monkeypatch):
    run(prepare.TINYSTORIES)

    class augment:
        def main(argv):
            rows = [json.loads(line) for line in open(argv[0], encoding="utf-8")]
            assert [r["text"] for r in rows] == STORIES and rows[0]["features"] == ["Dialogue"]
            assert rows[-1]["story_id"].endswith(f"data/data01.jsonl:{len(STORIES) - 50}")
            assert not (tmp_path / "out/manifest.json").exists() and argv[2] == str(tmp_path / "out/instructions")
            (tmp_path / "threshold").write_text(argv[argv.index("--val-fraction") + 1])

    monkeypatch.setitem(sys.modules, "augment", augment)
    out = run(prepare.TINYSTORIES, "--instructions", "--overwrite")
    assert float((tmp_path / "threshold").read_text()) == manifest(out)["held_out_below"]


# ---- the download ----

def test_a_dropped_connection_goes_on_where_it_was(hub, run, tok):
    hub.drops = 3
    out = run(prepare.TINYSTORIES)
    assert len(told(tok, out, "train")) > 90
    ranges = [h.get("Range") for command, path, h in hub.seen if command == "GET" and path.startswith("/cdn/")]
    assert ranges[0] is None and len(ranges) == 4 and ranges[1] == f"bytes={len(ARCHIVE) // 2}-"
    assert hub.sent < len(ARCHIVE) + 200


def test_an_interrupted_run_goes_on(hub, run, tok, tmp_path, refused, tokenizer_dir, monkeypatch, capsys):
    argv = [prepare.TINYSTORIES, "--out", tmp_path / "out", "--tokenizer", tokenizer_dir]
    part = tmp_path / "downloads/TinyStories_all_data_zh.tar.gz.part"

    def interrupt(seconds):
        raise KeyboardInterrupt
    hub.drops = 1
    with monkeypatch.context() as patch:
        patch.setattr(download.time, "sleep", interrupt)
        with pytest.raises(SystemExit) as e:
            prepare.main([*map(str, argv)])
    assert e.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert part.stat().st_size == len(ARCHIVE) // 2 and not (tmp_path / "out").exists()
    hub.mode = "404"
    refused(prepare.main, argv, "404", hub.url, "--endpoint")
    hub.mode = ""
    sent = hub.sent
    assert sorted(told(tok, run(prepare.TINYSTORIES), "train"))
    assert hub.sent - sent < 0.6 * len(ARCHIVE) and not part.exists()


def test_a_server_without_ranges_starts_anew(hub, run, tok, refused, tokenizer_dir, tmp_path):
    hub.mode, hub.drops = "no range", 2
    assert len(told(tok, run(prepare.TINYSTORIES), "train")) > 90
    hub.drops = 99
    shutil.rmtree(tmp_path / "downloads")
    with pytest.raises(SystemExit):
        run(prepare.TINYSTORIES, out="second")  # ends, though every attempt brings something
    assert not (tmp_path / "second").exists()


def test_a_corrupted_file_is_refused_and_deleted(hub, run, tok, refused, tokenizer_dir, tmp_path, capsys):
    hub.mode = "corrupted"
    argv = [prepare.TINYSTORIES, "--out", tmp_path / "out", "--tokenizer", tokenizer_dir]
    with pytest.raises(SystemExit) as e:
        prepare.main([*map(str, argv)])
    assert e.value.code == 2
    assert "sha256" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "downloads").glob("*.gz*t")) and not list((tmp_path / "downloads").glob("*.gz"))
    assert not (tmp_path / "out").exists()
    hub.mode = ""
    run(prepare.TINYSTORIES)
    (tmp_path / "downloads/TinyStories_all_data_zh.tar.gz").write_bytes(ARCHIVE[:-1] + b"x")  # spoiled since
    out = run(prepare.TINYSTORIES, out="again")
    assert manifest(out)["sources"][0]["sha256"] == hashlib.sha256(ARCHIVE).hexdigest()


def test_a_plain_url(hub, run, tok, refused, tokenizer_dir, tmp_path):
    url, sha256 = hub.url + "/plain/stories.tgz", hashlib.sha256(ARCHIVE).hexdigest()
    argv = [url, "--out", tmp_path / "out", "--tokenizer", tokenizer_dir]
    hub.drops = 1
    assert len(told(tok, run(url, "--sha256", sha256.upper()), "train")) > 90
    shutil.rmtree(tmp_path / "downloads")
    hub.drops = 99
    with pytest.raises(SystemExit):
        prepare.main([*map(str, argv), "--overwrite"])
    # another file at the same URL, of the same size: the part of the old one is of no use
    hub.drops, hub.etag, hub.body = 0, '"v2"', OTHER
    out = run(url, "--overwrite")
    assert manifest(out)["sources"][0]["sha256"] == hashlib.sha256(hub.body).hexdigest()
    hub.etag = '"v1"'
    with pytest.raises(SystemExit):
        run(url, "--sha256", sha256, out="other")
    refused(prepare.main, [url, hub.url + "/cdn/stories.tgz", *argv[1:], "--overwrite"], "stories.tgz", "two URLs")


def test_another_file_while_the_connection_was_down(hub, tmp_path, monkeypatch):
    """If-Range: the server that has another version by now sends it whole."""
    url = hub.url + "/plain/stories.tgz"

    def change(seconds):
        hub.etag, hub.body = '"v2"', OTHER
    monkeypatch.setattr(download.time, "sleep", change)
    hub.drops = 1
    path, sha256 = download.download(url, tmp_path)
    assert path.read_bytes() == hub.body != ARCHIVE


# ---- what users can mend ----

def test_a_wrong_endpoint_is_one_line(hub, refused, tokenizer_dir, tmp_path):
    argv = [prepare.TINYSTORIES, "--out", tmp_path / "out", "--tokenizer", tokenizer_dir]
    refused(prepare.main, [*argv, "--endpoint", "http://127.0.0.1:1"], "127.0.0.1:1", "refused", "HF_ENDPOINT")
    refused(prepare.main, [*argv, "--endpoint", "hf-mirror.example"], "--endpoint", "hf-mirror.example")
    refused(prepare.main, [*argv, "--endpoint", hub.url + "/nowhere/"], hub.url + "/nowhere/datasets", "404")
    hub.mode = "page"
    refused(prepare.main, argv, hub.url, "HTML")
    assert not (tmp_path / "out").exists() and not (tmp_path / "downloads").exists()


@pytest.mark.parametrize("content, words", [
    (ARCHIVE[:len(ARCHIVE) // 2], ["not a whole tar.gz"]),
    (ARCHIVE[:-4], ["not a whole tar.gz"]),  # after the last row
    (ARCHIVE[:-8] + bytes(8), ["not a whole tar.gz", "CRC"]),
    (b"\x1f\x8bjunk", ["not a whole tar.gz"]),
    (pack({"readme.txt": "x"}), ["no story"]),
    (b"PK\x03\x04 zip", ["no story", "row 1"]),
    (b"", ["no story"]),
    (lines(*ROWS).encode("utf-16"), ["UTF-16"]),
    (lines(ROWS[0], ROWS[0]).encode(), ["none is left"]),
])
def test_files_that_will_not_do(content, words, tokenizer_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", tarfile.RECORDSIZE)  # nothing of the file is read by the way
    path = tmp_path / "source"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as e:
        prepare.main([str(path), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and all(word in last for word in words), last
    assert not list((tmp_path / "out").iterdir())


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


def test_workers_do_not_load_pytorch():
    code = "import sys; sys.path[:0] = ['.']; import data.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
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
