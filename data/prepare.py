"""Public stories into token files for pretrain.py: download, check, tokenize, hold out.

    python data/prepare.py tinystories-zh --out out/data/tinystories --tokenizer base --instructions
    python pretrain.py --data out/data/tinystories --out out/my_base

A source is tinystories-zh (TinyStoriesChinese, 2.6 GB, from the Hugging Face hub or a mirror of it) or a file: JSONL,
a JSON list, or a tar.gz of such. A row's story is its `story_zh`, `text` or `story`. --out gets

    train.bin, val.bin   the stories' ids, an EOS behind each, as uint16 (uint32 for a large vocabulary)
    tokenizer.*          what they were tokenized with
    rejected.jsonl       every row that is no story: file, row, reason
    instructions/        with --instructions: what augment.py makes of the same rows
    manifest.json        sources, numbers, checksums
"""
import gzip
import hashlib
import json
import os
import re
import shlex
import sys
import tarfile
import zlib
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import check_new, command_line, fail, new_directory, positive, to_path, write_json  # noqa: E402

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

import tokenizer as tokenizers  # noqa: E402
from checkpoint import save_tokenizer  # noqa: E402
from records import RowError, place, scan, text_field  # noqa: E402

TINYSTORIES = "tinystories-zh"
REPOSITORY, ARCHIVE = "adam89/TinyStoriesChinese", "TinyStories_all_data_zh.tar.gz"
DOWNLOADS = Path("out/downloads")

BATCH = 4096  # stories that are tokenized at once
SHOWN = 3     # rejected rows of a source that are printed


# ---- sources ----

def find(name, args):
    """A source, downloaded if need be -> {source, file, size, sha256}. Raises ValueError and OSError."""
    source, path = name, Path(name)
    if name == TINYSTORIES:
        source, path = f"{args.endpoint}/datasets/{REPOSITORY}", download(args.endpoint)
    elif re.match("https?://", name):
        raise ValueError(f"{name}: download it first (curl -LO {shlex.quote(name)}) and name the file")
    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    if args.sha256 and sha256 != args.sha256.lower():
        raise ValueError(f"--sha256: {path} has {sha256}")
    return {"source": source, "file": str(path), "size": path.stat().st_size, "sha256": sha256}


def download(endpoint):
    """-> the file of TINYSTORIES. A download that was interrupted goes on; what is there is not loaded again."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{TINYSTORIES} is downloaded by huggingface_hub: pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset", endpoint=endpoint, local_dir=DOWNLOADS))
    except Exception as e:  # of its own, of the HTTP library beneath, or of the file system
        problem = str(e.__cause__ or e).strip().split("\n")[0]
        raise ValueError(f"{TINYSTORIES} could not be downloaded from {endpoint}: {problem} "
                         f"(--endpoint or HF_ENDPOINT names a mirror)") from None


def documents(f, path):
    """An open file, or tar.gz of files -> (name, binary stream) of each JSON in it."""
    zipped = f.read(2) == b"\x1f\x8b"
    f.seek(0)
    if not zipped:
        yield str(path), f
        return
    with gzip.open(f) as unzipped:
        with tarfile.open(fileobj=unzipped, mode="r|", bufsize=1 << 18) as archive:  # a stream, never unpacked as files
            for member in archive:
                if not member.isfile() or Path(member.name).name.startswith("."):  # ._name: what macOS adds
                    continue
                if member.name.endswith((".json", ".jsonl")):
                    yield f"{path}: {member.name}", archive.extractfile(member)
                else:
                    print(f"{path}: {member.name} is left out, neither .json nor .jsonl", file=sys.stderr)
        while unzipped.read(1 << 18):  # to its end, where its checksum is
            pass


def stories(source, rejected):
    """Yield (story, its record, file:row) of a source, and count its rows. What is no story is written to the open
    file `rejected`. Raises ValueError."""
    path, first = source["file"], ""
    source |= {"rows": 0, "rejected": 0}
    try:
        with open(path, "rb") as f:
            for name, stream in documents(f, path):
                for row, record in scan(stream, name):
                    source["rows"] += 1
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


def instruction_row(text, record, name):
    """What augment.py reads. TinyStories keeps its features under `instruction`, a story record on top."""
    given = record.get("instruction")
    features = (given if isinstance(given, dict) else record).get("features") or []
    return json.dumps({"text": text, "features": features, "story_id": name}, ensure_ascii=False) + "\n"


# ---- tokens ----

def tokenize(tokenizer, texts):
    """-> the bytes of each text in a token file."""
    for ids in tokenizer.encode_all(texts):
        yield np.array(ids + [tokenizer.eos_id], tokenizer.dtype).tobytes()


def write_tokens(path, parts):
    """-> (bytes written, sha256)"""
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        for part in parts:
            f.write(part)
            digest.update(part)
        return f.tell(), digest.hexdigest()


def prepare(args):
    """All of it -> the manifest. Raises ValueError and OSError."""
    check_new(args.out, args.overwrite, "manifest.json")
    tokenizer = tokenizers.load(args.tokenizer)
    sources = [find(name, args) for name in args.sources]
    with new_directory(args.out) as work:
        places, tokens, characters = [], [], 0  # of each story; all tokens of TinyStories are a gigabyte
        with (open(work / "rejected.jsonl", "w", encoding="utf-8") as rejected,
              open(work / "rows.jsonl", "w", encoding="utf-8") as rows,
              tqdm(desc="tokenizing", unit="story", unit_scale=True, disable=None) as bar):
            rest = (story for source in sources for story in stories(source, rejected))
            while batch := list(islice(rest, BATCH)):
                texts = [text for text, _, _ in batch]
                places += map(place, texts)
                tokens += tokenize(tokenizer, texts)
                characters += sum(map(len, texts))
                if args.instructions:
                    rows.writelines(instruction_row(*story) for story in batch)
                bar.update(len(batch))

        n = min(args.val_stories, max(1, len(places) // 20))
        threshold = float(np.nextafter(sorted(places)[n - 1], 1))  # copies have the same place
        manifest = {"command": args.command, "sources": sources, "stories": {}, "tokens": {}, "sha256": {},
                    "characters": characters, "held_out_below": threshold, "dtype": tokenizer.dtype.name,
                    "vocab_size": tokenizer.vocab_size}
        for side, of_val in (("train", False), ("val", True)):
            parts = [part for part, p in zip(tokens, places) if (p < threshold) == of_val]
            if not parts:
                raise ValueError("all stories are the same one, and it is held out: none is left to train on")
            size, manifest["sha256"][f"{side}.bin"] = write_tokens(work / f"{side}.bin", parts)
            manifest["stories"][side], manifest["tokens"][side] = len(parts), size // tokenizer.dtype.itemsize
        save_tokenizer(work, tokenizer)
        manifest["sha256"]["tokenizer.model"] = hashlib.sha256(tokenizer.identity).hexdigest()
        if args.instructions:
            import augment  # here, because augment.py stands below data/ in the order of the files
            # split at the same place, each story by itself: what is held out here is no story of train.bin
            augment.augment(augment.parse_args([
                str(work / "rows.jsonl"), "--out", str(work / "instructions"), "--extract", "words,sentence", "--exact",
                "--tokenizer", str(args.tokenizer), "--val-fraction", repr(threshold)]))
        (work / "rows.jsonl").unlink()
        write_json(work / "manifest.json", manifest)
    return manifest


# ---- the command ----

def parse_args(argv=None):
    parser = command_line("Make token files of public stories.")
    flag = parser.add_argument
    flag("sources", nargs="+", metavar="SOURCE", help=f"{TINYSTORIES}, or files: .jsonl, .json, .tar.gz of these")
    flag("--out", type=to_path, required=True, help="directory for the token files, like out/data/NAME")
    flag("--tokenizer", type=to_path, required=True, help="tokenizer.model, or a directory with one")
    flag("--endpoint", default=os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
         help=f"hub or mirror that has {TINYSTORIES} (default: HF_ENDPOINT, now %(default)s)")
    flag("--sha256", help="checksum that the source must have, in hex")
    flag("--val-stories", type=positive(int), default=40_000,
         help="stories held out, at most a twentieth (default: %(default)s)")
    flag("--instructions", action="store_true", help="make instruction data of the same rows, too")
    flag("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    args.endpoint = args.endpoint.rstrip("/")
    args.command = shlex.join(["python", "data/prepare.py", *(sys.argv[1:] if argv is None else argv)])
    return args


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
