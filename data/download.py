"""A file from the hub, from a mirror of it or from any URL: resumed where it stopped, checked by size and sha256."""
import hashlib
import os
import re
import sys
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

TIMEOUT = 30        # seconds without a byte
TRIES, WAIT = 5, 2  # attempts in a row that bring nothing new; seconds before the next one, more each time
PIECE = 1 << 18     # bytes read at once


class Redirects(urllib.request.HTTPRedirectHandler):
    """Followed, except when asking the hub for size and checksum: the server behind it does not know the latter."""

    def redirect_request(self, request, fp, code, msg, headers, newurl):
        if request.get_method() == "HEAD" and "X-Linked-Size" in headers:
            return None
        new = super().redirect_request(request, fp, code, msg, headers, newurl)
        new.method = request.get_method()  # a HEAD would become a GET
        return new


def ask(url, method="GET", headers=None):
    """-> the open answer. Raises OSError, or ValueError for a page where a file should be."""
    request = urllib.request.Request(url, headers=headers or {}, method=method)
    answer = urllib.request.build_opener(Redirects).open(request, timeout=TIMEOUT)
    if answer.headers.get_content_type() == "text/html":
        answer.close()
        raise ValueError("the answer is an HTML page, not a file")
    return answer


def describe(url):
    """-> (size, sha256, ETag) of what the URL serves, each None if the server does not tell."""
    try:
        with ask(url, "HEAD") as answer:
            headers = answer.headers
    except HTTPError as e:
        headers = e.headers if "X-Linked-Size" in e.headers else {}
        if not headers and e.code not in (403, 405, 501):  # there are servers that know no HEAD
            raise
    size = headers.get("X-Linked-Size") or headers.get("Content-Length")
    sha256 = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", ""))  # of small files it is a git hash
    etag = headers.get("ETag", "")
    return size and int(size), sha256 and sha256[1], etag if etag.startswith('"') else None


def download(url, folder, sha256=None):
    """-> (file, sha256) of what the URL serves, in `folder`. What is there is not loaded again; a part is gone on with.
    Raises ValueError if size or checksum are wrong."""
    size, known, etag = describe(url)
    sha256, path = sha256 or known, folder / file_name(url)
    if path.is_file() and (size or sha256) and size in (None, path.stat().st_size):
        if (found := checksum(path)) == (sha256 or found):
            print(f"{path}: already there")
            return path, found
    folder.mkdir(parents=True, exist_ok=True)
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    version = sha256 or etag or ""  # a part is of use only while the server has the same file
    if not (version and tag.is_file() and tag.read_text(encoding="utf-8") == version):
        part.unlink(missing_ok=True)
        tag.write_text(version, encoding="utf-8")
    fetch(url, part, size, resume=bool(version), etag=None if known else etag)
    found = checksum(part)
    if found != (sha256 or found):
        part.unlink()
        raise ValueError(f"what came has the sha256 {found}, not {sha256}, and is deleted; try again, or elsewhere")
    os.replace(part, path)
    tag.unlink()
    return path, found


def fetch(url, part, size, resume, etag):
    """Download to `part` until it is whole, through dropped connections."""
    idle, most = 0, had(part)
    while True:
        try:
            size = receive(url, part, size, resume, etag)
            if size is None or had(part) >= size:
                return
            problem = "the connection was dropped"
        except (OSError, HTTPException) as e:
            code = getattr(e, "code", 500)
            if code == 416:  # nothing is missing behind the part
                return
            if code < 500 and code != 429:
                raise
            problem = e
        idle = 0 if had(part) > most else idle + 1
        most = max(most, had(part))
        if idle == TRIES:
            raise ValueError(f"{problem}, {TRIES} times in a row; the same command goes on")
        tqdm.write(f"{problem} at byte {had(part):,}; trying again", file=sys.stderr)
        time.sleep(WAIT * (idle + 1))


def receive(url, part, size, resume, etag):
    """One connection: append to `part` what is missing. -> the size of the whole file, None if nobody tells."""
    start = had(part) if resume else 0
    headers = {"Range": f"bytes={start}-", **({"If-Range": etag} if etag else {})} if start else {}
    with ask(url, headers=headers) as answer:
        if answer.status != 206:  # no ranges there, or another file by now: from its first byte on
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else size
        if total != (size or total):
            raise ValueError(f"the file has {total:,} bytes there, not {size:,}")
        with (open(part, "ab" if start else "wb") as f,
              tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar):
            while data := answer.read1(PIECE):
                f.write(data)
                bar.update(len(data))
    return total


def had(part):
    return part.stat().st_size if part.exists() else 0


def is_url(source):
    return re.match("https?://", source)


def file_name(url):
    return Path(unquote(urlsplit(url).path)).name or "index"


def checksum(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
