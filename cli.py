"""What the command lines share: the error that a user can mend, and numbers with limits. Nothing here needs PyTorch."""
import argparse
import math
import sys
from pathlib import Path


def fail(message):
    """What a user can mend: one clear line, exit code 2, no traceback."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value
    parse.__name__ = kind.__name__  # what argparse calls it where the text is no number
    return parse


def not_negative(kind):
    def parse(text):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is below 0")
        return value
    parse.__name__ = kind.__name__  # what argparse calls it where the text is no number
    return parse


def fraction(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return value
