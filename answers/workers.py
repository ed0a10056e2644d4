"""math-verify, in processes that compare one pair at a time and are killed when they overrun.

    pool.run([(pred, gold), ...], limit=2.0)    # a Result each, in order

sympy, under math-verify, may hang in C code or take all memory over a short text of a model; no alarm inside a process
stops that for certain. So it runs in processes with a limit of time and memory, started when first needed, kept, and
replaced when they die. They send and receive JSON over a socket, see no GPU and import no torch.
"""

import atexit
import json
import logging
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from multiprocessing.connection import Connection, Pipe

from answers import rules
from answers.calculator import TooBig
from answers.normalize import ROW
from answers.rules import GoldTooBig, Result

MEMORY = 2 << 30  # bytes of address space
START = 300.0  # seconds in which a worker must have imported sympy
GRACE = 0.5  # seconds beyond the limit after which the parent kills the worker
MAX_CHARS = 400  # math-verify's grammar takes a millisecond for a few characters
MAX_CACHED = 4096  # results

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # now: the working directory may change
_PROGRAM = ["-m", "answers.workers"]


# --------------------------------------------------------------------------- inside a worker

_TOWERS = re.compile(r"\^\s*[{(]*\s*\d+\s*[})]*\s*\^|\^\s*[{(]*\s*-?\d{4,}|\d{4,}\s*[})]*\s*!|!\s*[)}]*\s*!|\d{400}")
_SIDE_BY_SIDE = re.compile(  # numbers that the grammar would add, as of a mixed number: 7 5, (1) 20, 1.2.3
    r"(?:(?<![_^])\d|\))\s+\.?\d|\d\.\d+\.|%\s*\d|\\ldots\s*\d"
)
_VETTED = re.compile(r"[\w\s+\-*/^=<>()\[\]{}|\\.,:;!&%'~]*", re.ASCII)


def math_verify(pred: str, gold: str) -> bool:
    """math-verify on two vetted LaTeX strings, by its LaTeX grammar alone (never parse_expr)."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from math_verify import verify
    from sympy import Basic, MatrixBase

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    parsed = []
    for text, error in ((gold, GoldTooBig), (pred, TooBig)):
        text = text.replace(ROW, r"\\")
        if len(text) > MAX_CHARS or _TOWERS.search(text):
            raise error("for sympy")
        if not _VETTED.fullmatch(text) or "__" in text or _SIDE_BY_SIDE.search(text):
            return False
        try:
            parsed.append(latex2sympy(text, is_real=True, normalization_config=config))
        except (MemoryError, RecursionError):
            raise
        except Exception:  # the grammar raises bare Exception for whatever it cannot read
            return False
    if not all(isinstance(x, Basic | MatrixBase) for x in parsed):
        return False
    return bool(verify(*parsed, float_rounding=12, numeric_precision=30, timeout_seconds=None))


class _Overrun(BaseException):
    """Raised by the alarm; no `except Exception` of sympy's may stop it."""


def _interrupt(*_) -> None:
    raise _Overrun


def _compare(pred: str, gold: str, limit: float) -> Result:
    """One comparison, interrupted by an exception at its limit: the worker, with all it has imported, stays.

    Where a long C call keeps that from happening, the parent kills the worker; if the parent is dead, a second timer
    does, one second of processor time after the limit.
    """
    signal.setitimer(signal.ITIMER_VIRTUAL, limit + 1.0)  # default action: the process ends
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            result = rules.decide(pred, gold)
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


def worker_main(search_path: list[str]) -> None:
    """Receive {pred, gold, limit} and send {verdict, reason}, as JSON, over the socket that is stdin.

    It ends by itself when the other end closes: a thread waits for that, also while sympy is busy.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(os.dup(0))
    questions: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                questions.put(json.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)

    def send(**message) -> None:
        connection.send_bytes(json.dumps(message).encode())

    del sys.path[0]  # the project's folder: a library must not find a file of ours instead of its own
    sys.path += [path for path in search_path if path not in sys.path]
    logging.disable(logging.CRITICAL)
    rules.last_resort = math_verify
    math_verify(r"\int_0^1 x^2 dx", r"\lfloor x \rfloor")  # sympy imports much of itself on first use
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ValueError, OSError) as error:  # macOS has no such limit
        print(f"verify worker: no memory limit ({error})", file=sys.stderr)
    sys.setrecursionlimit(4000)
    threading.Thread(target=receive, daemon=True).start()
    send(ready=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGALRM, _interrupt)
    while True:
        result = _compare(**questions.get())
        send(verdict=result.verdict, reason=result.reason)
        if _peak_memory() > MEMORY // 2:
            os._exit(0)  # a fresh one will take over


def _peak_memory() -> int:
    """The most bytes that this process has used. On Linux ru_maxrss outlives exec, and would be that of the trainer."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return max((int(line.split()[1]) for line in file if line.startswith(("VmHWM", "VmRSS"))), default=0) * 1024


# --------------------------------------------------------------------------- the pool


class _Worker:
    """One worker process, asked one question at a time."""

    def __init__(self):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
        command = [sys.executable, *_PROGRAM, json.dumps([os.path.abspath(path) for path in sys.path])]
        self.connection, other_end = Pipe()
        with other_end:
            self.process = subprocess.Popen(command, stdin=other_end, stdout=subprocess.DEVNULL, env=env, cwd=_ROOT)
        self.started = False

    def start(self) -> None:
        if not self.started:
            self.receive(START)
            self.started = True

    def ask(self, pred: str, gold: str, limit: float) -> Result:
        self.connection.send_bytes(json.dumps({"pred": pred, "gold": gold, "limit": limit}).encode())
        return Result(**self.receive(limit + GRACE))

    def receive(self, limit: float) -> dict:
        """Its next message; TimeoutError if it is late, EOFError or OSError if it is dead."""
        if not self.connection.poll(limit):
            raise TimeoutError
        return json.loads(self.connection.recv_bytes())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Pool:
    """Workers, started when first needed and kept; a thread for each during a batch."""

    def __init__(self):
        self.size = max(2, min(4, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.workers: list[_Worker] = []
        self.results: dict[tuple[str, str], tuple[Result, float]] = {}  # with the limit each had
        self.lock = threading.Lock()

    def run(self, pairs: list[tuple[str, str]], limit: float) -> list[Result]:
        """Results of `pairs` in order; each takes at most `limit` seconds, killing its worker included."""
        with self.lock:
            unknown = [pair for pair in pairs if not self._is_known(pair, limit)]
            self._grow(len(unknown))
            idle = deque(range(len(self.workers)))
            while unknown and idle:  # the pairs of a worker that does not start go to the others
                with ThreadPoolExecutor(len(idle)) as threads:
                    try:
                        answers = threads.map(self._ask, unknown, repeat(limit), repeat(idle))
                        for pair, result in zip(unknown, answers, strict=True):
                            if result is not None:
                                self.results[pair] = result, limit
                    except BaseException:  # Ctrl-C: the answers are no longer wanted
                        self.close()
                        raise
                unknown = [pair for pair in unknown if not self._is_known(pair, limit)]
            if unknown:
                raise RuntimeError("verify: no worker starts (see stderr); is math-verify installed?")
            results = [self.results[pair][0] for pair in pairs]
            for pair in list(self.results)[:-MAX_CACHED]:
                del self.results[pair]
        return results

    def _is_known(self, pair: tuple[str, str], limit: float) -> bool:
        """Whether the result is kept; one that hit its limit says nothing about a longer limit."""
        result, had = self.results.get(pair, (None, 0.0))
        return result is not None and (result.verdict is not None or had >= limit)

    def _grow(self, wanted: int) -> None:
        self.workers += [_Worker() for _ in range(min(self.size, wanted) - len(self.workers))]

    def _ask(self, pair: tuple[str, str], limit: float, idle: deque[int]) -> Result | None:
        """Give a pair to an idle worker, which is replaced when it is late or dead. None if it does not start; its slot
        is then out for the rest of the batch."""
        try:
            slot = idle.popleft()
        except IndexError:
            return None
        for _ in range(2):  # the first death may be a kill from outside: the pair is tried again
            if not self._starts(slot):
                return None
            try:
                result = self.workers[slot].ask(*pair, 0.9 * limit)  # the rest is for killing it
                break
            except TimeoutError:
                self._replace(slot)
                result = Result(None, "time limit")
                break
            except (EOFError, OSError, ValueError):
                self._replace(slot)
                result = Result(None, "its worker died (memory or stack)")
        idle.appendleft(slot)
        return result

    def _starts(self, slot: int) -> bool:
        for _ in range(3):
            try:
                self.workers[slot].start()
                return True
            except (EOFError, OSError, ValueError):
                self._replace(slot)
        return False

    def _replace(self, slot: int) -> None:
        """A fresh worker, which starts while the others work. IndexError ends the thread of a closed pool."""
        self.workers[slot].kill()
        self.workers[slot] = _Worker()

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
    """A forked child must not share sockets with its parent, nor keep the parent's workers alive."""
    global pool
    for worker in pool.workers:
        worker.connection.close()
        worker.process.returncode = 0  # so that Popen does not wait for it: it is not our child
    pool = Pool()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: pool.close())


if __name__ == "__main__":
    worker_main(json.loads(sys.argv[1]))
