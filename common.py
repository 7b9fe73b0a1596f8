"""What every command shares: the command line and its errors, device and precision, atomic writes, stop signals, and
the processes of a torchrun."""
import sys

# Ctrl-C ends a command without a traceback, also while PyTorch is imported, so this file is imported first of all
sys.excepthook = lambda kind, *error: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)

import argparse
import atexit
import codecs
import contextlib
import ctypes
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = "0.28"

# ---- the command line ----

def command_line(description, prog=None):
    """-> an ArgumentParser whose errors are one line. From here on no character can crash the output: what the
    terminal's encoding lacks (✓ on a Chinese Windows, redirected) is printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog, description=description)
    parser.add_argument("--version", action="version", version=f"MicroStories {VERSION}, PyTorch {torch.__version__}")
    parser.error = fail
    return parser


def fail(message):
    """End the command for a user error (a text, or what was raised): one clear line, exit code 2, no traceback."""
    if isinstance(message, OSError) and message.filename and message.strerror:  # without its number
        message = f"{message.filename}: {message.strerror}"
    if rank() == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, allowed, says):
    """-> a type for argparse: a finite number of this kind (int or float) for which `allowed` holds."""
    def parse(text):
        value = kind(text)
        if not (is_number(value) and allowed(value)):
            raise argparse.ArgumentTypeError(f"{text} {says}")
        return value
    parse.__name__ = kind.__name__  # what argparse calls it where the text is not a number
    return parse


def positive(kind):
    return number(kind, lambda value: value > 0, "is not a positive number")


def not_negative(kind):
    return number(kind, lambda value: value >= 0, "is below 0")


# of stories, rows …: more of them at once is a mistake, and takes all memory
count = number(int, lambda value: 0 < value <= 4096, "is not from 1 to 4096")

# what PyTorch's generators take
seed_number = number(int, lambda value: 0 <= value < 2**63, "is outside 0 to 2^63 - 1")


def to_path(text):
    """A type for argparse: a Path. An empty one is an unset variable of the shell, and would be the current folder; one
    that is not UTF-8 could not be written into args.json."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"the path {text!r} is not UTF-8") from None
    return Path(text)


def is_number(value):
    """Is a value of a JSON file a number? Python takes true for 1, reads NaN and Infinity, and integers of any size."""
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def codec(name):
    """A type for argparse: the name of an encoding."""
    try:
        with contextlib.suppress(UnicodeError):
            b"aa".decode(name)  # hex and base64 are codecs, too, and not of text
        return codecs.lookup(name).name
    except LookupError:
        raise argparse.ArgumentTypeError(f"no encoding is called {name!r}") from None


fraction = number(float, lambda value: 0 <= value < 1, "is outside [0, 1)")


# ---- device and precision ----

def pick_device(name):
    """--device -> torch.device; the fastest there is if none is named. Under torchrun "cuda" is this process's own GPU.
    Raises ValueError if it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > torch.cuda.device_count():  # the same for all
            raise ValueError(f"{processes} processes need as many GPUs; there are {torch.cuda.device_count()}")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        if torch.device(name).type == "meta":
            raise ValueError(f"--device {name} computes nothing")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def has_bf16(device):
    """False where bfloat16 products are emulated: over a hundred times slower than float32's on a CPU of AVX2."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # no public function tells
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def pick_dtype(name, device):
    """--dtype, or 32-true with a notice on a device that has no bfloat16. None: the fast one for the device."""
    if name is None:
        return "32-true" if device.type == "cpu" else pick_dtype("bf16-mixed", device)
    if name != "32-true" and not has_bf16(device):
        print(f"notice: this {device.type} has no bfloat16; --dtype 32-true instead of {name}", file=sys.stderr)
        return "32-true"
    return name


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next step. It would give it back to the kernel, which then
    maps it anew, zeroed, page by page. With another C library: nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


# ---- files ----

def write_atomic(path, write):
    """write(temporary path), then rename: a reader sees the old file or the new one, never a part. Nor does one after a
    power cut: what is written reaches the disk before it gets its name."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask says; safetensors makes its files for their owner alone
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # how Python, torch.save and safetensors report a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write to {path}: {getattr(e, 'strerror', None) or e}") from None


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk. Where a system cannot: nothing."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_text(path, text):
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, records):
    """Records (an iterable) -> a file of one JSON object a line; its folder is made."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, write)


@contextlib.contextmanager
def new_directory(path):
    """with new_directory(path) as work: … fills the directory `work`, which becomes `path` when all is done (in place
    of what was there). Where something goes wrong, nothing is left of it, and what was there stays."""
    path = Path(path)
    work, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        sync(work)
        if path.exists():  # if not, a kill between these renames has left `old` as the only good one
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        work.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_writable(directory):
    """Can files be made in this directory (or where it would be made)? Call it before hours of work, not after.
    Raises OSError naming the folder; leaves nothing behind."""
    path = Path(directory).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise OSError(f"cannot write to {directory}: {e.strerror} ({there})") from None


def check_new(directory, overwrite, mark):
    """May `new_directory` make this one? mark: the file by which an older result of the same command is known."""
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        if not overwrite:
            raise ValueError(f"--out {directory} is there already: --overwrite replaces it")
        if not (directory / mark).is_file():
            raise ValueError(f"--out {directory} has no {mark}, so it is something else, and is not replaced")
    check_writable(directory.parent)


locks = {}  # folder: its open file descriptor, held as long as the process lives


def lock(directory):
    """Raise ValueError if another process has this folder; from here on it is this one's, until it ends in whatever
    way. Where folders cannot be locked (Windows, some network drives): nothing."""
    directory = Path(directory).resolve()
    if fcntl is None or directory in locks:
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks[directory] = fd
    except BlockingIOError:
        os.close(fd)
        raise ValueError(f"--out {directory}: another run is writing there") from None
    except OSError:
        os.close(fd)


# ---- logging elsewhere ----

LOGGERS = "tensorboard", "wandb"


def logger(name, out, settings):
    """--log -> tell(fields), which shows a line of log.jsonl there; None -> None. Ends the command if the package is
    not installed."""
    if name is None:
        return None
    try:
        if name == "wandb":
            import wandb
            run = wandb.init(project="microstories", name=Path(out).name, dir=str(out), config=settings)
            return lambda fields: run.log({k: v for k, v in fields.items() if k != "step"}, step=fields["step"])
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(Path(out) / "tensorboard")
    except ImportError:
        fail(f"--log {name}: pip install {name}")
    except Exception as e:  # no login, no network: errors of their own
        fail(f"--log {name}: {str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}")
    atexit.register(writer.close)
    writer.add_text("settings", json.dumps(settings, indent=2, ensure_ascii=False))

    def tell(fields):
        for key, value in fields.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, fields["step"])
    return tell


# ---- stopping ----

class StopSignals:
    """Ctrl-C, SIGTERM and a terminal that is closed ask the loop to stop after the step that is under way; a second
    signal kills at once. What the process is told to ignore (nohup) stays ignored."""

    def __enter__(self):
        self.requested = False
        signums = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        self.previous = {signum: signal.signal(signum, self.request) for signum in signums
                         if signal.getsignal(signum) != signal.SIG_IGN}
        return self

    def request(self, signum, frame):
        self.requested = True
        signal.signal(signum, self.previous[signum])
        if signum == getattr(signal, "SIGHUP", None):  # the terminal has gone: what is printed to it would fail
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


# ---- the processes of a torchrun; without one there is a single process, of rank 0 ----

def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device):
    """Let the processes of a torchrun find each other; all but the first keep quiet. Without torchrun: nothing."""
    if world() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def wait_for_all():
    """Nobody goes on before everybody is here."""
    if world() > 1:
        dist.barrier()


def sum_over_processes(*numbers):
    """-> their sums over all processes, a list of floats."""
    if world() == 1:
        return [float(n) for n in numbers]
    total = torch.tensor(numbers, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(params):
    """Sum .grad over all processes, in float32; one that had no rows adds zeros."""
    if world() == 1:
        return
    flat = torch.cat([torch.zeros_like(p).flatten().float() if p.grad is None else p.grad.flatten().float()
                      for p in params])
    dist.all_reduce(flat)  # all in one message
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p).to(p.dtype)
