"""Public stories into token files for pretrain.py: download, check, tokenize, hold out.

    python data/prepare.py tinystories-zh --out out/data/tinystories --tokenizer base --instructions
    python pretrain.py --data out/data/tinystories --out out/my_base

A source is tinystories-zh (TinyStoriesChinese, 2.6 GB, from the Hugging Face hub or a mirror of it), a file or a URL:
JSONL, a JSON list, or a tar.gz of such. A row's story is its `story_zh`, `text` or `story`. --out gets

    train.bin, val.bin   the stories' ids, an EOS behind each, as uint16 (uint32 for a large vocabulary)
    tokenizer.*          what they were tokenized with
    rejected.jsonl       every row that is no story: file, row, reason
    instructions/        with --instructions: what augment.py makes of the same rows
    manifest.json        sources, numbers, checksums; written last, it vouches for the others
"""
import argparse
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

import tokenizer as tokenizers  # noqa: E402
from common import fail, positive  # noqa: E402
from data.download import PIECE, checksum, download, file_name, is_url  # noqa: E402
from parallel import in_order  # noqa: E402
from records import RowError, place, scan_stream, text_field  # noqa: E402

# Every worker imports this file too: nothing above may import PyTorch (1.6 s and 220 MB a process).

TINYSTORIES = "tinystories-zh"
TINYSTORIES_PATH = "datasets/adam89/TinyStoriesChinese/resolve/main/TinyStories_all_data_zh.tar.gz"
DOWNLOADS = Path("out/downloads")

BATCH = 1 << 18     # characters that a worker tokenizes at once
SPLIT = 1 << 14     # stories that are copied to train.bin or val.bin at once
SHOWN = 3           # rejected rows of a source that are printed


# -----------------------------------------------------------------------------
# rows

def documents(f, path):
    """An open file, or tar.gz of files -> (name, binary stream) of each JSON in it."""
    zipped = f.read(2) == b"\x1f\x8b"
    f.seek(0)
    if not zipped:
        yield str(path), f
        return
    with gzip.open(f) as unzipped:
        with tarfile.open(fileobj=unzipped, mode="r|", bufsize=PIECE) as archive:  # a stream, never unpacked as files
            for member in archive:
                if not member.isfile() or Path(member.name).name.startswith("."):  # ._name: what macOS adds
                    continue
                if member.name.endswith((".json", ".jsonl")):
                    yield f"{path}: {member.name}", archive.extractfile(member)
                else:
                    print(f"{path}: {member.name} is left out, neither .json nor .jsonl", file=sys.stderr)
        while unzipped.read(PIECE):  # to its end, where its checksum is
            pass


def stories(source, rejected, bar):
    """Yield (story, its record, file:row) of a source, and count its rows. What is no story goes to `rejected`."""
    path, begun, first = source["file"], bar.n, ""
    source |= {"rows": 0, "rejected": 0}
    try:
        with open(path, "rb") as f:
            for name, stream in documents(f, path):
                for row, record in scan_stream(stream, name):
                    source["rows"] += 1
                    if source["rows"] % 1000 == 0:
                        bar.update(begun + f.tell() - bar.n)
                    try:
                        if isinstance(record, RowError):
                            raise record
                        text = text_field(name, row, record, ["story_zh", "text", "story"])
                    except ValueError as e:
                        source["rejected"] += 1
                        first = first or f" ({e})"
                        line = {"file": name, "row": row, "reason": str(e)}
                        rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
                        if source["rejected"] <= SHOWN:
                            tqdm.write(f"rejected: {e}", file=sys.stderr)
                        continue
                    yield text, record, f"{name}:{row}"
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: not a whole tar.gz ({e})") from None
    if source["rows"] == source["rejected"]:
        raise ValueError(f"{path}: no story in it{first}")
    bar.update(begun + source["size"] - bar.n)


def instruction_row(text, record, name):
    """What augment.py reads. TinyStories keeps its features under `instruction`, a story record on top."""
    given = record.get("instruction")
    features = (given if isinstance(given, dict) else record).get("features") or []
    return json.dumps({"text": text, "features": features, "story_id": name}, ensure_ascii=False) + "\n"


# -----------------------------------------------------------------------------
# tokens

def start_worker(path):
    global tokenizer
    tokenizer = tokenizers.load(path)


def tokenize(texts):
    """In a worker: texts -> (places in the split, lengths in tokens, all tokens)."""
    rows = [tokenizer.story(text) for text in texts]
    return np.array([place(text) for text in texts]), np.array([len(r) for r in rows], np.uint32), np.concatenate(rows)


def batches(texts):
    """Lists of texts of about BATCH characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize_all(texts, path, out):
    """Write the tokens of all texts to `out`, in their order, on all cores -> (places, lengths), each (stories,)."""
    places, lengths = [], []
    with open(out, "wb") as f:
        for where, length, tokens in in_order(tokenize, batches(texts), start_worker, (path,)):
            places.append(where)
            lengths.append(length)
            f.write(tokens.tobytes())
    return np.concatenate(places), np.concatenate(lengths)


def split(path, dtype, places, lengths, threshold):
    """One token file -> train.bin and val.bin beside it; val: the places below the threshold. -> their numbers."""
    tokens = np.memmap(path, dtype, "r")
    told = {"stories": {}, "tokens": {}, "sha256": {}}
    for side, chosen in (("train", places >= threshold), ("val", places < threshold)):
        digest, count, at = hashlib.sha256(), 0, 0
        with open(path.with_name(f"{side}.bin"), "wb") as f:
            for i in range(0, len(places), SPLIT):
                n = lengths[i:i + SPLIT]
                end = at + int(n.sum())
                part = tokens[at:end][np.repeat(chosen[i:i + SPLIT], n)]
                f.write(part.tobytes())
                digest.update(part)
                count, at = count + len(part), end
        told["stories"][side], told["tokens"][side] = int(chosen.sum()), count
        told["sha256"][f"{side}.bin"] = digest.hexdigest()
    return told


# -----------------------------------------------------------------------------
# command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Make token files of public stories.")
    parser.error = fail
    flag = parser.add_argument
    flag("sources", nargs="+", metavar="SOURCE", help=f"{TINYSTORIES}, files or URLs: .jsonl, .json, .tar.gz of these")
    flag("--out", type=Path, required=True, help="directory for the token files, like out/data/NAME")
    flag("--tokenizer", type=Path, required=True, help="tokenizer.model, or a directory with one")
    flag("--endpoint", default=os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
         help=f"hub or mirror that has {TINYSTORIES} (default: HF_ENDPOINT, now %(default)s)")
    flag("--sha256", help="checksum that the source must have, in hex")
    flag("--val-stories", type=positive(int), default=40_000,
         help="stories held out, at most a twentieth (default: %(default)s)")
    flag("--instructions", action="store_true", help="make instruction data of the same rows, too")
    flag("--overwrite", action="store_true", help="replace what is in --out")
    args = parser.parse_args(argv)
    if not is_url(args.endpoint):
        fail(f"--endpoint (or HF_ENDPOINT) {args.endpoint} does not begin with https://")
    if args.sha256 and (len(args.sources) > 1 or not re.fullmatch("[0-9a-fA-F]{64}", args.sha256)):
        fail("--sha256: 64 hexadecimal digits, for one source")
    args.command = shlex.join(["python", "data/prepare.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def find(args):
    """The sources as files, downloaded if need be -> [{source, file, size, sha256}]."""
    urls = [f"{args.endpoint.rstrip('/')}/{TINYSTORIES_PATH}" if s == TINYSTORIES else s for s in args.sources]
    names = [file_name(url) for url in urls if is_url(url)]
    if len(set(names)) < len(names):
        raise ValueError(f"two URLs have the file name {max(names, key=names.count)}; prepare one after the other")
    found, expected = [], args.sha256 and args.sha256.lower()
    for url in urls:
        if is_url(url):
            try:
                path, digest = download(url, DOWNLOADS, expected)
            except (ValueError, OSError, HTTPException) as e:
                mirror = "; --endpoint or HF_ENDPOINT names a mirror" if url.endswith(TINYSTORIES_PATH) else ""
                raise ValueError(f"{url}: {e}{mirror}") from None
        else:
            path, digest = Path(url), checksum(url)
            if digest != (expected or digest):
                raise ValueError(f"--sha256: {path} has {digest}")
        found.append({"source": url, "file": str(path), "size": path.stat().st_size, "sha256": digest})
    return found


def prepare(args):
    """All of it -> the manifest. The files are made in --out/unfinished and moved when all are there."""
    out, work = args.out, args.out / "unfinished"
    if not args.overwrite and any((out / name).exists() for name in ("manifest.json", "train.bin", "tokenizer.model")):
        raise ValueError(f"--out {out} already holds data or a model: --overwrite replaces it")
    tokenizer = tokenizers.load(args.tokenizer)
    if args.instructions:
        import augment  # here, so that workers do not import it, and before hours of work
    sources, characters = find(args), 0

    def texts():
        nonlocal characters
        for source in sources:
            for text, record, name in stories(source, rejected, bar):
                if args.instructions:
                    rows.write(instruction_row(text, record, name))
                characters += len(text)
                yield text

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with (open(work / "rejected.jsonl", "w", encoding="utf-8") as rejected,
              open(work / "rows.jsonl", "w", encoding="utf-8") as rows,
              tqdm(total=sum(s["size"] for s in sources), unit="B", unit_scale=True, desc="tokenizing") as bar):
            places, lengths = tokenize_all(texts(), args.tokenizer, work / "all.bin")
        n = min(args.val_stories, max(1, len(places) // 20))
        threshold = float(np.nextafter(np.partition(places, n - 1)[n - 1], 1))  # copies have the same place
        told = split(work / "all.bin", tokenizer.dtype, places, lengths, threshold)
        if not told["stories"]["train"]:
            raise ValueError("all stories are the same one, and it is held out: none is left to train on")
        told["sha256"]["tokenizer.model"] = hashlib.sha256(tokenizer.files["tokenizer.model"]).hexdigest()
        manifest = {"command": args.command, "sources": sources, **told, "characters": characters,
                    "held_out_below": threshold, "dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size}
        for name in ("manifest.json", *tokenizers.FILES):  # what vouches for the old files goes first
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "instructions", ignore_errors=True)
        for name in ("train.bin", "val.bin", "rejected.jsonl"):
            os.replace(work / name, out / name)
        tokenizer.save(out)
        if args.instructions:  # what it holds out is below the same threshold, so no story of train.bin
            augment.main([str(work / "rows.jsonl"), "--out", str(out / "instructions"), "--extract", "words,sentence",
                          "--tokenizer", str(args.tokenizer), "--val-fraction", repr(threshold), "--overwrite"])
        (work / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=2) + "\n", "utf-8")
        os.replace(work / "manifest.json", out / "manifest.json")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def main(argv=None):
    args = parse_args(argv)
    try:
        manifest = prepare(args)
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command goes on where a download stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as e:
        fail(e)
    n, tokens = manifest["stories"], sum(manifest["tokens"].values())
    print(f"{args.out}: {n['train']:,} stories to train on, {n['val']:,} held out; {tokens:,} tokens, "
          f"{manifest['characters'] / tokens:.2f} characters each; "
          f"{sum(source['rejected'] for source in manifest['sources']):,} rows rejected")


if __name__ == "__main__":
    from data.prepare import main
    main()
