"""verify.py against hostile text, crashes, forks and kills: it answers in time, leaves nothing."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import verify
from answers import workers
from answers.rules import decide

ROOT = Path(__file__).parent.parent
# legal, and far beyond any limit
BUSY = r"\int_0^1 \int_0^1 \int_0^1 e^{\sin(x^y)^{\cos z}} dx dy dz"


def deep(n: int) -> tuple[str, str]:
    """A pair that is equal, and that only a worker can decide."""
    return rf"\lfloor {n}.5 \rfloor", str(n)


def workers_of(pid: int) -> list[psutil.Process]:
    """The live worker processes below `pid`; one that ends meanwhile is left out."""
    live = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "answers" in " ".join(child.cmdline()):
                    live.append(child)
    return live


def gone(pids: list[int], within: float) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module", autouse=True)
def warm_pool():
    verify.warm_up()


SENTINEL = "/tmp/verify_was_here"
HOSTILE = {
    "tower": "9^{9^{9^9}}",
    "tower in braces": "{9}^{{9}^{{9}^{{9}}}}",
    "tower of parentheses": "(9)^((9)^((9)^(9)))",
    "plain tower": "9**9**9**9",
    "factorial tower": "((((9!)!)!)!)!",
    "large factorial": "99999999!",
    "factorials": "9" + "!" * 500,
    "factorial of a variable": r"\lfloor (10^{9})! \rfloor",
    "nested braces": "{" * 10_000 + "5" + "}" * 10_000,
    "nested parentheses": "(" * 900 + "5" + ")" * 900,
    "unbalanced": "(" * 1900,
    "nested fractions": r"\frac{1}{" * 300 + "2" + "}" * 300,
    "nested roots": r"\sqrt{" * 250 + "2" + "}" * 250,
    "megabyte of digits": "7" * 1_000_000,
    "digits": "7" * 1900,
    "small exponent of a large number": "7" * 900 + "^{" + "9" * 900 + "}",
    "product of large powers": r"2^{8000} \cdot 3^{5000} \cdot " * 40 + "1",
    "sum of large fractions": "+".join(f"1/{p}^{{{900 + p}}}" for p in range(2, 120)),
    "right-to-left override": "\u202e42",
    "NUL": "42\0",
    "NUL protocol": "\0=\0x\0y",
    "lone surrogate": "\ud800" + "42",
    "macro": r"\def\x{\x\x}\x",
    "newcommand": r"\newcommand{\a}{\b\b}\newcommand{\b}{\a\a}\a",
    "input": r"\input{/etc/passwd}",
    "write18": rf"\immediate\write18{{touch {SENTINEL}}}",
    "import": f"__import__('os').system('touch {SENTINEL}')",
    "import in math": rf"\frac{{__import__('os').system('touch {SENTINEL}')}}{{1}}",
    "import in text": rf"\text{{__import__('os').system('touch {SENTINEL}')}}",
    "import in a name": rf"\operatorname{{__import__('os').system('touch {SENTINEL}')}}(1)",
    "import in a subscript": rf"x_{{__import__('os').system('touch {SENTINEL}')}}",
    "import in a list": f"42, __import__('os').system('touch {SENTINEL}')",
    "eval": f"eval(\"open('{SENTINEL}','w')\")",
    "open": f"open('{SENTINEL}','w')",
    "dunder": "().__class__.__bases__[0].__subclasses__()",
    "lambda": "(lambda: 42)()",
    "format string": "{0.__class__}%s%n" * 50,
    "json": '{"verdict": true}',
    "huge matrix": r"\begin{pmatrix}" + r"\\".join(["1&" * 20 + "1"] * 40) + r"\end{pmatrix}",
    "determinant": r"\det\begin{pmatrix}" + r"\\".join(["a&b&c&d&e&f&g"] * 7) + r"\end{pmatrix}",
    "identity of a billion": r"\operatorname{eye}(1000000000)",
    "zeros": r"\operatorname{zeros}(100000,100000)",
    "long list": ",".join(str(i) for i in range(600)),
    "long union": r"\cup".join(f"({i},{i + 1})" for i in range(200)),
    "regex spaces": " " * 1500 + "x" + " " * 400,
    "regex spaces after a command": "\\x" + " " * 1990 + "!",
    "regex quads": "\\frac{1}{2}" + "\\quad " * 320 + "x",
    "regex math mode": "\\pi" + "$ $" * 660 + "x",
    "regex of": r"3 \text{ cups" + " of a" * 390 + "}",
    "regex letters": "a" * 1999,
    "regex words": "cm " * 650,
    "regex text": r"\text{" * 300,
    "regex minus": "-" * 1999,
    "regex commas": "," * 1999,
    "regex groups": "1,1" * 600,
    "regex choice": "A, " * 650 + "!",
    "regex equals": "x=" * 900 + "1",
    "regex plus minus": r"\pm" * 600,
    "plus minus in lists": ",".join([r"\pm 1 \pm 2"] * 60),
    "long sum": BUSY,
    "integral": r"\int_0^1 \int_0^1 \int_0^1 e^{\sin(x^y)^{\cos z}} dx dy dz",
    "limit": r"\lim_{x\to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^{77}}",
    "deep functions": r"\sin(" * 40 + "x" + ")" * 40 + r"\lfloor 1 \rfloor",
    "binomial": r"\binom{10^{9}}{5 \cdot 10^{8}} + \lfloor 1 \rfloor",
    "gcd": r"\gcd(10^{99999}, 6)",
    "polynomial": r"(x+y+z+w)^{400} \lfloor 1 \rfloor",
    "empty boxes": r"\boxed{}" * 200,
    "emoji": "🙂" * 900,
    "combining marks": "4" + "\u0301" * 1500 + "2",
}  # fmt: skip


@pytest.mark.parametrize("gold", ["43", r"\frac{3\sqrt{2}}{4}"])
def test_hostile_text_is_refused_with_a_reason(gold):
    results = verify.explain_many([(text, gold) for text in HOSTILE.values()], timeout=0.4)
    for name, result in zip(HOSTILE, results, strict=True):
        assert result.verdict in (False, None), name
        assert result.reason, name
    assert not os.path.exists(SENTINEL)


def test_hostile_gold_is_never_confirmed():
    results = verify.verify_many([("43", text) for text in HOSTILE.values()], timeout=0.4)
    assert set(results) <= {False, None}
    assert not os.path.exists(SENTINEL)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_does_not_hold_up_the_rules(name):
    """What is decided without a worker has no limit. Half a second of processor time at most; a hang would be hours."""
    start = time.process_time()
    decide(HOSTILE[name], r"\frac{3\sqrt{2}}{4}")
    decide("x^2", HOSTILE[name])
    assert time.process_time() - start < 30.0


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 25_000, "{" * 200_000, r"\boxed{5}" * 25_000, "\\" * 100_000, r"\boxed" * 25_000]
)
def test_extraction_takes_linear_time(text):
    start = time.process_time()
    verify.extract_boxed(text)
    verify.parse_verdict(text)
    assert time.process_time() - start < 30.0  # a second; quadratic would take hours


def test_what_hit_its_limit_is_asked_again_for_a_longer_one(monkeypatch):
    limits = []
    ask = workers._Worker.ask
    monkeypatch.setattr(workers._Worker, "ask", lambda *args: limits.append(args[-1]) or ask(*args))
    for timeout in (0.3, 0.3, 0.2, 0.6):
        assert verify.verify_many([(BUSY + "+2", "1")], timeout=timeout) == [None]
    assert limits == pytest.approx([0.27, 0.54])


# --------------------------------------------------------------------------- workers that misbehave

MISBEHAVIOUR = """
import json, os, signal, sys
from answers import workers

def spin():
    while True:
        pass

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_once():
    if not os.path.exists(os.environ["DIED_ONCE"]):
        open(os.environ["DIED_ONCE"], "w").close()
        die()
    return True

acts = {
    "1000": spin,
    "1001": spin,
    "1002": lambda: sum(range(10**13)),  # in C: hours in which Python sees no signal and runs no other thread
    "1003": lambda: bool(bytearray(workers.MEMORY + (1 << 30))),
    "1004": lambda: bool(b"1" * (workers.MEMORY // 2 + (64 << 20))),
    "1005": die,
    "1006": die_once,
}
math_verify = workers.math_verify
workers.math_verify = lambda pred, gold: acts[gold]() if gold in acts else math_verify(pred, gold)
workers.worker_main(json.loads(sys.argv[1]))
"""
SPIN, SPIN_TOO, DEAF, HOG, GROW, DIE, DIE_ONCE = ((r"\lfloor 0.5 \rfloor", str(gold)) for gold in range(1000, 1007))


@pytest.fixture
def pool(monkeypatch, tmp_path):
    """A pool of one worker, in which the pairs above misbehave instead of sympy."""
    monkeypatch.setenv("DIED_ONCE", str(tmp_path / "died"))
    monkeypatch.setattr(workers, "_PROGRAM", ["-c", MISBEHAVIOUR])
    pool = workers.Pool()
    pool.size = 1
    monkeypatch.setattr(workers, "pool", pool)
    yield pool
    pool.close()


def outcome(pool: workers.Pool, pair: tuple[str, str], timeout: float) -> tuple:
    """The result of a pair, and whether the worker stays; a well-behaved pair must be answered afterwards."""
    pool.warm_up()
    before = pool.workers[0].process.pid
    result = verify.explain_many([pair], timeout)[0]
    assert verify.verify_many([deep(6)], timeout=60) == [True]
    return result.verdict, result.reason, pool.workers[0].process.pid == before


def test_a_worker_stops_at_its_limit_and_stays(pool, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 60.0)  # the machine may be busy
    assert outcome(pool, SPIN, timeout=0.5) == (None, "time limit", True)


def test_a_worker_that_does_not_stop_at_its_limit_is_killed_and_replaced(pool):
    assert outcome(pool, DEAF, timeout=0.5) == (None, "time limit", False)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no limit of address space")
def test_a_worker_gets_no_more_memory_than_its_limit(pool):
    assert outcome(pool, HOG, timeout=60) == (None, "memory limit", True)


def test_a_worker_that_has_grown_is_replaced(pool):
    assert outcome(pool, GROW, timeout=60) == (True, "rules", False)


def test_a_worker_of_a_process_that_has_grown_stays(pool):
    """Any trainer has."""
    assert b"1" * (workers.MEMORY // 2 + (64 << 20))
    assert outcome(pool, deep(5), timeout=60) == (True, "rules", True)


def test_a_worker_that_dies_at_work_gives_none(pool):
    assert outcome(pool, DIE, timeout=60) == (None, "its worker died (memory or stack)", False)


def test_a_pair_whose_worker_was_killed_is_tried_again(pool):
    assert outcome(pool, DIE_ONCE, timeout=60) == (True, "rules", False)


def test_where_one_worker_does_not_start_the_others_answer_and_where_none_does_that_is_said(pool, monkeypatch):
    pool.size = 2
    broken, start = {1}, workers._Worker.start

    def start_or_fail(worker):
        if pool.workers.index(worker) in broken:
            raise EOFError
        start(worker)

    monkeypatch.setattr(workers._Worker, "start", start_or_fail)
    pairs = [deep(depth) for depth in range(4, 10)]
    assert verify.verify_many(pairs, timeout=60) == [True] * len(pairs)
    broken.add(0)
    with pytest.raises(RuntimeError, match="no worker starts"):
        verify.verify_many([deep(11)], timeout=60)


def test_two_hostile_pairs_spend_their_limit_side_by_side(pool, monkeypatch):
    pool.size = 2
    pool.warm_up()
    spans, ask = {}, workers._Worker.ask

    def timed(worker, pred, gold, limit):
        start = time.monotonic()
        result = ask(worker, pred, gold, limit)
        spans[gold] = (start, time.monotonic())
        return result

    monkeypatch.setattr(workers._Worker, "ask", timed)
    monkeypatch.setattr(workers, "GRACE", 60.0)
    results = verify.verify_many([SPIN, ("5", "5"), SPIN_TOO, deep(2)], timeout=2.0)
    assert results == [None, True, None, True]
    (start, end), (other_start, other_end) = spans[SPIN[1]], spans[SPIN_TOO[1]]
    assert max(start, other_start) < min(end, other_end)


# --------------------------------------------------------------------------- threads, forks, ends


def test_killed_workers_are_replaced():
    assert verify.verify_many([deep(5)], timeout=60) == [True]
    for worker in workers_of(os.getpid()):
        worker.kill()
    assert verify.verify_many([deep(7)], timeout=60) == [True]
    assert len(workers_of(os.getpid())) <= workers.pool.size


def test_threads_share_the_pool_and_get_their_own_verdicts():
    answers = [None] * 8

    def ask(i):
        answers[i] = verify.verify_many([deep(100 + i), (str(i), "3")], timeout=30)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert answers == [[True, i == 3] for i in range(8)]


def _ask_in_child(queue):
    queue.put((verify.verify_many([deep(11)], timeout=30)[0], [w.pid for w in workers_of(os.getpid())]))


def test_a_forked_child_has_its_own_pool():
    before = {w.pid for w in workers_of(os.getpid())}
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_ask_in_child, args=(queue,))
    child.start()
    answer, pids = queue.get(timeout=300)
    child.join(60)
    assert answer is True
    assert pids
    assert not before & set(pids)
    assert gone(pids, within=120.0)
    assert verify.verify_many([deep(13)], timeout=30) == [True]
    assert {w.pid for w in workers_of(os.getpid())} == before


CHILD = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
import verify
from answers import workers
mode = sys.argv[1]
if mode == "deaf":
    workers._PROGRAM = ["-c", sys.argv[2]]
workers.pool.size = 1
verify.warm_up()
if mode != "exit":
    print("ready", flush=True)
    verify.verify_many({{"busy": [({BUSY!r}, "1")], "deaf": [{DEAF!r}]}}.get(mode, []), timeout=3)
    threading.Event().wait()
"""


def start_child(mode: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, mode, MISBEHAVIOUR], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("mode", ["idle", "busy", "deaf"])
def test_workers_end_when_their_parent_is_killed(mode):
    child = start_child(mode)
    assert child.stdout.readline().strip() == "ready"
    time.sleep(0.5)
    pids = [w.pid for w in workers_of(child.pid)]
    assert pids
    child.kill()
    child.wait()
    assert gone(pids, within=120.0)


def test_interrupt_ends_the_parent_and_its_workers():
    child = start_child("busy")
    assert child.stdout.readline().strip() == "ready"
    time.sleep(0.5)
    pids = [w.pid for w in workers_of(child.pid)]
    child.send_signal(signal.SIGINT)
    assert child.wait(60) != 0
    assert pids
    assert gone(pids, within=120.0)


def test_normal_exit_leaves_no_worker():
    child = start_child("exit")
    pids = []
    while child.poll() is None:
        pids = [w.pid for w in workers_of(child.pid)] or pids
        time.sleep(0.05)
    assert child.returncode == 0
    assert pids
    assert gone(pids, within=120.0)


def test_the_pool_works_in_another_folder_and_interpreter(tmp_path):
    """From another directory, by a relative path, and with an interpreter that lacks our packages."""
    code = f"""if True:
        import os, sys
        sys.path.insert(0, os.path.relpath({str(ROOT)!r}))
        import verify
        from answers import workers
        os.chdir("/")
        sys.executable = sys._base_executable
        assert verify.verify_many([{deep(17)!r}], timeout=60) == [True]
        workers.pool.close()
        print("done")
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "done", run.stderr


def test_a_worker_imports_the_rules_and_nothing_else_of_ours():
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from answers import workers
        workers.math_verify("x", "x")
        assert "torch" not in sys.modules
        root = {str(ROOT)!r}
        files = [getattr(m, "__file__", None) or "" for m in list(sys.modules.values())]
        print(*sorted(f.removeprefix(root) for f in files if f.startswith(root) and ".venv" not in f))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [
        f"/answers/{name}.py"
        for name in ("__init__", "calculator", "normalize", "rules", "structure", "units", "workers")
    ]


def test_verify_imports_no_sympy_torch_or_numpy():
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import verify
        assert verify.is_equal('1/2', '0.5')
        print([m for m in ('sympy', 'math_verify', 'mpmath', 'torch', 'numpy') if m in sys.modules])
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --------------------------------------------------------------------------- fuzzing

FRAGMENTS = r"""
    \frac{1}{2} \sqrt { } ( ) [ ] \{ \} ^ _ ! % $ \$ , ; = < \leq \cup \in \pm \infty \pi \text{or}
    \text{cm} and \begin{pmatrix} & \\ \end{pmatrix} 1 2 42 9^9 0.5 . - + * / x y e i A (B) Yes
    \left \right \log_ \sin \circ 1,234 | : ½ ² √ ' __ \binom \overline \mathbb{R} \emptyset \boxed{
    １ million km/h # ~ \lfloor \rfloor \int \sum_{k=1}^{n} \cdot f(x) dx >
""".split()
FRAGMENTS += [" ", "\n", "\t", "\0", "\u202e", "\u200b", "\ud800"]
GOLDS = [
    "42",
    r"\frac{1}{2}",
    "x^2+1",
    "(1,2)",
    r"[0,\infty)",
    "B",
    "Yes",
    "3.14",
    r"1 \pm \sqrt{2}",
    "5 cm",
    "x=1, y=2",
    "2:3",
]


def fuzzed(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    strings = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.7:
            text = "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 14)))
        elif kind < 0.9:
            text = "".join(
                chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x3000)))) for _ in range(rng.randint(1, 40))
            )
        else:
            text = "".join(rng.choices(FRAGMENTS, k=2)) * rng.randint(1, 400)
        strings.append((text, rng.choice(GOLDS)))
    return strings


def test_fuzzed_text_neither_hangs_nor_leaks():
    """Every pair is decided in time, by no more workers than the pool has, and the parent's memory stays flat."""
    pairs = fuzzed(20_000, seed=1)
    process = psutil.Process()
    verify.verify_many(pairs[:300], timeout=0.1)
    before = process.memory_info().rss
    results = [decide(*pair) for pair in pairs]
    assert {r.verdict for r in results if r} <= {True, False, None}
    unreadable = [pair for pair, r in zip(pairs, results, strict=True) if r is None]
    assert len(unreadable) > 1000
    decided = verify.explain_many(unreadable[:200], timeout=0.1)  # ten milliseconds each for the grammar
    assert all(r.reason for r in decided)
    grown = process.memory_info().rss - before
    print(f"fuzz: {len(unreadable)} of {len(pairs)} unreadable, parent grew {grown / 2**20:.1f} MiB")
    assert grown < 60 << 20
    assert len(workers_of(os.getpid())) <= workers.pool.size
    for text, _ in pairs[:4000]:
        verify.extract_boxed(text)
        verify.parse_verdict(text)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=200), st.sampled_from(GOLDS))
def test_any_text_gets_a_verdict_or_none(text, gold):
    assert verify.explain_many([(text, gold)], timeout=0.5)[0].verdict in (True, False, None)
    verify.parse_verdict(text)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_every_usable_text_equals_itself(text):
    """Also through normalization: with spaces around it and inside a box."""
    assert verify.is_equal(text, text) in ((True,) if text.strip() else (None, False))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_are_equal_only_if_they_are(a, b):
    assert verify.is_equal(str(a), str(b)) is (a == b)
    assert verify.is_equal(f"{a:,}", str(a)) is True
    assert verify.is_equal(rf"\frac{{{a}}}{{7}}", f"{a + 1}/7") is False
