"""Processes that compare one pair at a time and are killed when they overrun.

    pool.run([(pred, gold), ...], limit=2.0)    # a Result each, in order

sympy, under math-verify, may hang in C code or want all memory for a short text of a model; no alarm
inside the process stops that for certain. So it runs in processes with a limit of time and memory,
started when first needed, kept, and replaced when they die. They speak lines of JSON over pipes, see
no GPU and import no torch.
"""

import atexit
import json
import logging
import os
import queue
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import equality
from equality import Result

MEMORY = 2 << 30  # bytes of address space
START = 300.0  # seconds in which a worker must have imported sympy
GRACE = 0.5  # seconds beyond the limit after which the parent kills the worker

_FILE = os.path.abspath(__file__)  # now: the working directory may change


# --------------------------------------------------------------------------- inside a worker


class _Overrun(BaseException):
    """Raised by the alarm; no `except Exception` of sympy's may stop it."""


def _interrupt(*_) -> None:
    raise _Overrun


def _compare(pred: str, gold: str, limit: float) -> Result:
    """One comparison, interrupted by an exception at its limit: the worker, with all it has imported, stays.

    Where a long C call keeps that from happening, the parent kills the worker; if the parent is dead,
    a second timer does, one second of the worker's own time after the limit.
    """
    signal.setitimer(signal.ITIMER_VIRTUAL, limit + 1.0)  # default action: the end
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            result = equality.decide(pred, gold)
        except MemoryError:
            result = Result(None, "memory limit")
        except RecursionError:
            result = Result(False, "nested too deeply")
        except Exception as error:  # sympy raises anything; the reason travels to the caller
            result = Result(False, f"sympy: {type(error).__name__}: {error}"[:200])
        signal.setitimer(signal.ITIMER_REAL, 0)
    except _Overrun:
        result = Result(None, "time limit")
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return result


def _worker_main(search_path: list[str]) -> None:
    """Read {pred, gold, limit} lines of JSON from stdin, write {verdict, reason} lines to stdout.

    It ends by itself when stdin closes: a thread waits for that, also while sympy is busy.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    items: queue.SimpleQueue = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            items.put(json.loads(line))
        os._exit(0)

    def answer(**message) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    del sys.path[0]  # this folder: no library shall find a file of ours instead of its own
    sys.path += [path for path in search_path if path not in sys.path]
    logging.disable(logging.CRITICAL)
    equality.in_worker = True
    equality.math_verify(r"\int_0^1 x^2 dx", r"\lfloor x \rfloor")  # sympy imports much of itself on first use
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ValueError, OSError) as error:  # macOS has no such limit
        print(f"verify worker: no memory limit ({error})", file=sys.stderr)
    sys.setrecursionlimit(4000)
    threading.Thread(target=read, daemon=True).start()
    answer(ready=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGALRM, _interrupt)
    maxrss_unit = 1 if sys.platform == "darwin" else 1024  # bytes
    while True:
        result = _compare(**items.get())
        answer(verdict=result.verdict, reason=result.reason)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * maxrss_unit > MEMORY // 2:
            os._exit(0)  # a fresh one will take over


# --------------------------------------------------------------------------- the pool


class _Worker:
    """One worker process, asked for one item at a time."""

    def __init__(self):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
        command = [sys.executable, _FILE, "--worker", json.dumps(sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env)
        self.started = False

    def start(self) -> None:
        if not self.started:
            self.receive(START)
            self.started = True

    def ask(self, pred: str, gold: str, limit: float) -> Result:
        self.process.stdin.write((json.dumps({"pred": pred, "gold": gold, "limit": limit}) + "\n").encode())
        return Result(**self.receive(limit + GRACE))

    def receive(self, limit: float) -> dict:
        """Its next message; TimeoutError if it is late, EOFError if it is dead."""
        deadline, line = time.monotonic() + limit, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                if not (data := os.read(self.process.stdout.fileno(), 65536)):
                    raise EOFError
                line += data
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Workers, started when first needed and kept; a thread serves each during a batch."""

    def __init__(self):
        self.size = max(2, min(4, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.workers: list[_Worker] = []
        self.lock = threading.Lock()

    def run(self, jobs: list[tuple[str, str]], limit: float) -> list[Result]:
        """Results of `jobs` in order; each takes at most `limit` seconds, killing its worker included."""
        results: list[Result | None] = [None] * len(jobs)
        waiting = deque(enumerate(jobs))
        with self.lock:
            threads = [
                threading.Thread(target=self._serve, args=(slot, waiting, results, limit), daemon=True)
                for slot in range(self._grow(len(jobs)))
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            except BaseException:  # Ctrl-C: nobody waits for the answers any more
                waiting.clear()
                self.close()
                raise
        if None in results:
            raise RuntimeError("verify: no worker starts (see stderr); is math-verify installed?")
        return results

    def _grow(self, wanted: int) -> int:
        self.workers += [_Worker() for _ in range(min(self.size, wanted) - len(self.workers))]
        return min(self.size, wanted)

    def _serve(self, slot: int, waiting: deque, results: list, limit: float) -> None:
        """Give the worker of one slot an item after the other; replace it when it is late or dead."""
        item, deaths = None, 0
        while (item or waiting) and deaths < 3:
            try:
                self.workers[slot].start()
                item = item or waiting.popleft()
                results[item[0]] = self.workers[slot].ask(*item[1], 0.9 * limit)  # the rest is for killing it
                item, deaths = None, 0
                continue
            except IndexError:  # another thread took the last item, or the pool was closed
                return
            except TimeoutError:
                deaths += item is None
                reason = "time limit"
            except (EOFError, OSError, ValueError):
                deaths += 1
                reason = "its worker died (memory or stack)" if deaths == 2 else None
            if item and reason:  # the first death may be a kill from outside: the item is tried again
                results[item[0]], item, deaths = Result(None, reason), None, 0
            if slot < len(self.workers):
                self.workers[slot].kill()
                self.workers[slot] = _Worker()  # it starts while the others work

    def warm_up(self) -> None:
        with self.lock:
            self._grow(self.size)
            for worker in self.workers:
                worker.start()

    def close(self) -> None:
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.kill()


pool = Pool()


def _after_fork() -> None:
    """A forked child must not share pipes with its parent, nor keep the parent's workers alive."""
    global pool
    for worker in pool.workers:
        worker.close()
        worker.process.returncode = 0  # so that Popen does not wait for somebody else's child
    pool = Pool()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: pool.close())


if __name__ == "__main__":
    _worker_main(json.loads(sys.argv[2]))
