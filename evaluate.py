"""Run a model over benchmarks: answering, judging, and test-time scaling with the model as its own judge.

    python evaluate.py --model DIR_OR_NAME --benchmark test.json --mode tts --output results.json
    python calculate_acc.py --result_path results.json

    answer   one answer per question
    tts      test-time scaling, with the one model as its own judge; the first and the final answer are both scored, so
             that training and test-time scaling are never mixed up. --tts says how:
               reflect         answer, judge that answer, reflect while the verdict is No (paper, section 3.4) or there
                               is no answer to judge
               vote            --n answers, the most frequent one
               weighted_vote   the same, each answer weighted by the judge's probability that it is right
               best_of_n       --n answers, a knock-out of pairwise judgements in both orders; more votes win a tie
               compare         all of them, from one set of --n answers, each with the tokens that it takes
    judge    rows with chosen and rejected: which of two is correct, in both orders; rows with response and label:
             whether it is correct. Each verdict comes with its probability, from the log-probabilities of its tokens;
             --judge_samples k asks k times and takes the majority

Each row is a small generator that yields requests and returns its result, so that a row's next call goes out as soon as
its last one is back, whatever the other rows do. Finished rows are appended to OUTPUT.part as they finish; running the
same command again evaluates only what is missing or failed. A failed row is recorded with its error: it is not an
answer, right or wrong, and the exit status is 1 while any remain.

Rows are read as for training (data/README.md has the formats), and the judge prompts are prompts.py's, so a model is
tested on what it was trained on. Where completions come from: engines.py. The same in a notebook, records in and
records out:

    rows = [{"dataset": "sums", "problem": "1+1?", "answer": "2"}]
    results = evaluate_records(rows, TransformersEngine("runs/demo/spark"), Settings("spark", "tts"))
    print(render(summarise([tally("spark", rows=results)]), "table"))  # calculate_acc.py's
"""

import hashlib
import importlib.util
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.arguments import DataSettings
from data.cli import Errors, Parser, printable, progress_bar, refuse, write_atomically
from data.formats import columns
from data.progress import PartFile
from data.read import Reader
from data.rows import BadInput, BadRow, Source
from data.table import list_text
from engines import Output, TransformersEngine, VLLMEngine
from evaluation.server import ServerEngine
from evaluation.settings import EngineSettings, Settings, refuse_idle
from evaluation.solvers import SOLVERS, Calls, Solver

Row = dict[str, Any]


@dataclass
class _Running:
    """A row under way: its solver, the outputs of the calls it waits for, and how many are still out."""

    index: int
    row: Row
    solver: Solver
    outputs: list[Output | None] | None = None
    missing: int = 0
    calls: int = 0


def run(rows: Iterable[tuple[int, Row]], engine, settings: Settings) -> Iterator[list[tuple[int, Row]]]:
    """Yield [(index, result), ...] as rows finish, for (index, row) pairs. As many rows are under way as keep the
    engine busy; a row's next calls go out as soon as its last ones are back."""
    waiting = iter(rows)
    tickets = itertools.count()
    out: dict[int, tuple[_Running, int]] = {}  # ticket -> (row, place of the call among those it waits for)

    solver = SOLVERS[settings.tts if settings.mode == "tts" else settings.mode]

    def advance(running: _Running) -> Row | None:
        for output in running.outputs or ():
            if output.error is not None:
                return Calls(running.row, settings).result("", error=output.error)
        try:
            requests = running.solver.send(running.outputs)
        except StopIteration as finished:
            return finished.value
        assert requests, "a row that waits for nothing would never finish"
        running.outputs, running.missing = [None] * len(requests), len(requests)
        for place, request in enumerate(requests):
            sampling = settings.sampling.of(request)
            if sampling.temperature > 0:
                request = request._replace(seed=_seed(settings.seed, running.index, running.calls))
            ticket = next(tickets)
            out[ticket] = running, place
            engine.submit(ticket, request, sampling)
            running.calls += 1
        return None

    while True:
        while len(out) < engine.capacity and (pair := next(waiting, None)) is not None:
            index, row = pair
            advance(_Running(index, row, solver(row, settings)))
        if not out:
            return
        finished = []
        for ticket, output in engine.finished():
            running, place = out.pop(ticket)
            running.outputs[place] = output
            running.missing -= 1
            if running.missing == 0 and (result := advance(running)) is not None:
                finished.append((running.index, result))
        yield finished


def _seed(*parts: int) -> int:
    """The same for the same call of the same row, whenever it is made."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


def evaluate_records(records: list[Row], engine, settings: Settings) -> list[Row]:
    """Results of `records`, in their order. For notebooks and scripts; nothing is written.

    The records are what a benchmark file would hold; images may also be PIL images. Raises BadInput for one that can't
    be used.
    """
    rows = read_benchmark(Source(records, suffix=settings.prompt_suffix), settings.mode)
    results = dict(itertools.chain.from_iterable(run(enumerate(rows), engine, settings)))
    return [results[index] for index in range(len(rows))]


def benchmark_names(names: Sequence[str]) -> dict[str, str]:
    """What each benchmark is called: its file's name, with the folder's where others are called the same, as two
    downloads of test.jsonl are. Raises BadInput where one is given twice."""
    paths = Counter(os.path.realpath(name) for name in names)
    if twice := [name for name in names if paths[os.path.realpath(name)] > 1]:
        raise BadInput(f"--benchmark {twice[0]}: expected each once, got {twice[-1]} as well")
    called = {name: Path(name).stem for name in names}
    for longer in (lambda name: f"{Path(os.path.abspath(name)).parent.name}/{Path(name).stem}", str):
        alike = Counter(called.values())
        called = {name: short if alike[short] == 1 else longer(name) for name, short in called.items()}
    return called


def read_benchmark(source: Source, mode: str) -> list[Row]:
    """The rows of a benchmark. Images must be there, and are opened when a model is asked about them.

    Raises BadInput for data that can't be read, and for rows that the mode can't use.
    """
    rows = [row for _, _, row in Reader(source, "judge" if mode == "judge" else "answer", look=False)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    if bad:
        more = f"; {len(bad) - 1:,} more rows can't be used, python -m data.check names them" if len(bad) > 1 else ""
        raise BadInput(f"{source}: {bad[0]}{more}")
    if not rows:
        raise BadInput(f"{source}: expected at least one row, found none")
    parts: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["group"]:
            parts.setdefault((row["dataset"], row["group"][0]), set()).add(row["group"][1])
    for row in rows:
        if row["group"]:  # its size: --limit may leave parts of a question out
            of = parts[row["dataset"], row["group"][0]]
            row["group"] = None if columns.is_no_group(of) else [*row["group"], str(len(of))]
    return rows


def run_to_file(
    rows: list[Row], engine, settings: Settings, output: Path, wanted: list[int] | None = None
) -> list[Row]:
    """Evaluate what `output` does not hold yet; append each row as it finishes, then write the final JSON atomically.

    Args:
        wanted: which of `rows`, in order; None: all of them. Another run may want others, and goes on from this one.

    Raises BadInput if the file was made with other settings.
    """
    part = part_file(rows, settings, output)
    wanted = list(range(len(rows))) if wanted is None else wanted
    todo = [(i, rows[i]) for i in wanted if i not in part.done]
    with progress_bar(len(wanted), len(wanted) - len(todo), settings.mode) as bar:
        try:
            for finished in run(todo, engine, settings):
                part.add(dict(finished))
                bar.update(len(finished))
        finally:
            part.close()
    results = [part.done[i] for i in wanted]
    write_atomically(output, list_text(json.dumps(result, ensure_ascii=False) for result in results))
    return results


def part_file(rows: list[Row], settings: Settings, output: Path) -> PartFile:
    """OUTPUT.part, where results are kept while they come in; what it holds is without the failed ones.

    Raises BadInput if it, or `output`, is of another run.
    """
    path = output.with_name(output.name + ".part")
    if output.is_dir():
        raise BadInput(f"{output}: expected a file, got a folder")
    if output.exists() and not path.exists():
        raise BadInput(
            f"{output}: exists, and has no {path.name} that says what made it; give another --output or remove it"
        )
    header = {**asdict(settings), "number of rows": len(rows), **contents(settings, rows)}
    part = PartFile(path, header, fields=("error",))
    part.done = {index: result for index, result in part.done.items() if result["error"] is None}
    return part


def contents(settings: Settings, rows: list[Row]) -> dict[str, str]:
    """Digests of the questions and, for a model in a folder, of its files: the same name may hold another model."""
    questions = hashlib.blake2b(digest_size=8)
    for row in rows:
        left_out = ("images", "source", "task", "categories", "group")
        question = {name: value for name, value in row.items() if name not in left_out}
        budgets = [(image["min_pixels"], image["max_pixels"]) for image in row["images"]]
        questions.update(json.dumps([question, budgets], sort_keys=True).encode())
        for image in row["images"]:  # a file by its name, wherever it lies
            questions.update(image["bytes"] or os.path.basename(image["path"]).encode())
    digests = {"benchmark contents": questions.hexdigest()}
    if settings.reward_funcs:
        file = Path(settings.reward_funcs.rpartition(":")[0])
        digests["reward_funcs contents"] = hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
    folder = Path(settings.model)
    if settings.engine != "server" and folder.is_dir():
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as opened:
                for at in range(0, size, max(size // 256, 1 << 16)):  # all over it: training may leave the start as is
                    opened.seek(at)
                    digest.update(opened.read(1 << 16))
        digests["model contents"] = digest.hexdigest()
    return digests


def make_engine(settings: Settings, engine: EngineSettings):
    """The engine that the settings ask for. Raises BadInput where it can't be had."""
    from safetensors import SafetensorError

    try:
        if settings.engine == "server":
            model = settings.served_model or settings.model
            return ServerEngine(list(engine.server), model, engine.concurrency, engine.timeout, extra=settings.extra)
        if settings.engine == "vllm":
            share = engine.gpu_memory_utilization
            return VLLMEngine(
                settings.model,
                dtype=engine.dtype,
                max_model_len=engine.max_model_len,
                tensor_parallel_size=engine.tensor_parallel_size,
                **({} if share is None else {"gpu_memory_utilization": share}),
            )
        from transformers import set_seed

        set_seed(settings.seed)
        return TransformersEngine(settings.model, batch_size=engine.batch_size, dtype=engine.dtype)
    except BadInput:
        raise
    except (ValueError, ImportError, RuntimeError, SafetensorError) as error:  # about a model that can't be loaded
        raise BadInput(f"--model {settings.model}: {error}") from error


def choose_engine(engine: str, server: tuple[str, ...]) -> str:
    """`auto`: servers if there are any; vLLM where it is installed beside a GPU; else transformers."""
    if engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise BadInput("--engine vllm: expected vLLM to be installed (requirements.txt has its version)")
    if engine == "server" and not server:
        raise BadInput("--engine server: expected --server URL")
    if server and engine not in ("auto", "server"):
        raise BadInput(f"--server: expected --engine server beside it, got {engine}")
    if engine != "auto":
        return engine
    if server:
        return "server"
    if importlib.util.find_spec("vllm"):
        import torch

        if torch.cuda.is_available():
            return "vllm"
    return "transformers"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_fields(Settings)
    parser.add_fields(EngineSettings)
    parser.add_fields(DataSettings, dataset_split="test")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--limit", type=int, help="maximum number of rows per benchmark")
    parser.add_argument("--check", action="store_true", help="read the benchmarks and stop: no model is loaded")
    args = parser.parse_args()
    settings, engine, data = (parser.values(args, fields) for fields in (Settings, EngineSettings, DataSettings))
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit: expected a number from 1 on, got {args.limit}")
    try:
        settings = replace(settings, engine=choose_engine(settings.engine, engine.server))
        refuse_idle(settings, data)
        if settings.engine != "server" and (Path(settings.model) / "adapter_config.json").is_file():
            raise BadInput(
                f"--model {settings.model}: expected a model, got an adapter (LoRA); python -m training.merge "
                f"{settings.model} makes a model of it, in {settings.model}/merged"
            )
        _ = settings.reward  # refused now, and not after the first answer
        rows, wanted = [], []
        for name, called in benchmark_names(settings.benchmark).items():
            of_benchmark = read_benchmark(Source(name, data, settings.prompt_suffix, called=called), settings.mode)
            wanted += range(len(rows), len(rows) + len(of_benchmark[: args.limit]))
            rows += of_benchmark
        part_file(rows, settings, args.output)  # refused now, and not when the model is loaded
        if args.check:
            print(f"{len(wanted)} rows")
            return 0
        with closing(make_engine(settings, engine)) as running:
            results = run_to_file(rows, running, settings, args.output, wanted)
    except (BadInput, OSError) as error:
        return refuse("evaluate.py", error)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    errors, failed = Errors(), [result["error"] for result in results if result["error"] is not None]
    for error in failed:
        errors.add(error)
    print(*map(printable, errors.lines()), sep="\n", end="\n" if failed else "")
    print(f"{len(results)} rows, {len(failed)} failed; python calculate_acc.py --result_path {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
