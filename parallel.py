"""Batches of work on all cores, with the results in order and few of either in memory."""
import os
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context


def in_order(function, batches, start, values):
    """Yield function(batch) for each of the batches, in worker processes that call start(*values) first. Only as many
    batches are drawn in advance as keep the workers busy. Raises ChildProcessError when a worker is killed."""
    # spawned, not forked: a fork of a process in which PyTorch has started its threads may hang
    pool = ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_start, initargs=(start, values))
    try:
        with pool:
            waiting = deque()
            for batch in batches:
                waiting.append(pool.submit(function, batch))
                if len(waiting) > 4 * os.cpu_count():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed; perhaps there was not enough memory") from None


def _start(start, values):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's
    start(*values)
