"""Run a model over benchmarks: answering, judging, and test-time scaling with the model as its own judge.

    python evaluate.py --model DIR_OR_NAME --benchmark test.json --mode tts --output results.json
    python calculate_acc.py --result_path results.json

    answer   one answer per question
    tts      test-time scaling, with the one model as its own judge; the first and the final answer are both scored, so
             that training and test-time scaling are never mixed up. --tts says how:
               reflect         answer, judge the own answer, reflect while the verdict is negative (paper, section 3.4)
               vote            --n answers, the most frequent one
               weighted_vote   the same, each answer weighing what the judge thinks of it, asked with both letterings
               best_of_n       --n answers, a knock-out of pairwise judgements in both orders; a tie goes to more votes
    judge    rows with chosen and rejected: which of two is correct, in both orders; rows with response and label: is it

Each row is a small generator that yields requests and returns its result, so that a row's next call goes out as soon as
its last one is back, whatever the other rows do. Finished rows are appended to OUTPUT.part as they finish; running the
same command again evaluates only what is missing or failed. A failed row is recorded with its error: it is not an
answer, right or wrong, and the exit status is 1 while there is one.

Rows are read as for training (data/README.md has the formats), and the judge prompts are prompts.py's, so a model is
tested on what it was trained on. Where completions come from: engines.py. The same in a notebook, records in and
records out:

    rows = [{"dataset": "sums", "problem": "1+1?", "answer": "2"}]
    results = evaluate(rows, TransformersEngine("runs/demo/spark"), Settings("spark", "tts"))
    print(render(summarise([tally("spark", rows=results)]), "table"))  # calculate_acc.py's
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import verify
from data.cli import printable
from data.read import Reader, Source, add_source_flags, source_of
from data.rows import BadInput, BadRow, Rules
from engines import Output, Request, Sampling
from prompts import (
    PROMPT_SUFFIX,
    ask,
    neutralise,
    pairwise_instruction,
    pointwise_instruction,
    reflection_instruction,
)

Row = dict[str, Any]
MODES = ("answer", "tts", "judge")
TTS = ("reflect", "vote", "weighted_vote", "best_of_n")
ENGINES = ("auto", "vllm", "transformers", "server")
LEAST = {"max_tokens": 1, "temperature": 0, "repetition_penalty": 0.01, "max_rounds": 0, "n": 1, "limit": 1,
         "batch_size": 1, "max_model_len": 1, "concurrency": 1, "timeout": 0.1}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What decides a result. A results file made with other settings is not continued."""

    model: str
    mode: str
    benchmark: tuple[str, ...] = ()
    engine: str = "auto"
    max_tokens: int = 2048
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    tts: str = "reflect"
    max_rounds: int = 2
    n: int = 8
    judge_source: str = "cot"
    suffix: str = PROMPT_SUFFIX
    seed: int = 0

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.repetition_penalty)


class RequestFailed(Exception):
    """A request that came back without a completion; its message is the row's recorded error."""


# ---------------------------------------------------------------------------------------------------------------------
# Modes: a row in, requests out, a result back

Solver = Generator[list[Request], list[Output], Row]  # calls that may go out together, their outputs in that order


class _Tokens:
    """Counts the tokens of a row's calls, and turns a failed call into the row's error."""

    def __init__(self):
        self.prompt = self.completion = 0

    def read(self, outputs: list[Output]) -> list[str]:
        for output in outputs:
            if output.error is not None:
                raise RequestFailed(output.error)
            self.prompt += output.prompt_tokens
            self.completion += output.completion_tokens
        return [output.text for output in outputs]


def _shown(text: str, source: str) -> tuple[str, str]:
    """(what a judge sees of a response, its form): the box if asked for and there is one, else all of it."""
    boxed = verify.extract_boxed(text)
    if source == "answer" and boxed is not None:
        return neutralise(boxed), "answer"
    return neutralise(text), "cot"


def answer_row(row: Row, settings: Settings) -> Solver:
    """One answer, scored against the gold."""
    tokens = _Tokens()
    messages, images = row["prompt"], tuple(row["images"])
    (text,) = tokens.read((yield [Request(messages, images)]))
    return _scored(row, text, tokens)


def reflect_row(row: Row, settings: Settings) -> Solver:
    """Answer, judge the own answer, reflect while the verdict is No (paper, section 3.4). Every round is kept."""
    tokens = _Tokens()
    messages, images = row["prompt"], tuple(row["images"])
    (text,) = tokens.read((yield [Request(messages, images)]))
    first, first_tokens, rounds = text, tokens.completion, []
    for _ in range(settings.max_rounds):
        shown, form = _shown(text, settings.judge_source)
        question = ask(messages, pointwise_instruction(shown), settings.suffix)
        (judged,) = tokens.read((yield [Request(question, images)]))
        verdict = verify.parse_verdict(judged)
        rounds.append(_round(text, verdict, judged))
        if verdict != "No":  # an unparsed verdict is no reason to throw an answer away
            break
        question = ask(messages, reflection_instruction(shown, form, template=1), settings.suffix)
        (text,) = tokens.read((yield [Request(question, images)]))
    else:
        rounds.append(_round(text))
    reflections = sum(r["verdict"] == "No" for r in rounds)
    return _final(row, text, tokens, first, first_tokens, rounds, round_num=reflections)


def sampled_row(row: Row, settings: Settings) -> Solver:
    """`n` answers, one of them chosen: by majority, by majority weighted with the own judge's verdicts, or by a
    knock-out of pairwise judgements. Answers that are equal to the verifier are one answer.

    A judge may lean to a letter, so it is asked everything twice, with the letters the other way round. A pair is won
    by the side that both verdicts name; where one can't be read, or they contradict each other, by the side with more
    votes.
    """
    tokens = _Tokens()
    messages, images = row["prompt"], tuple(row["images"])
    outputs = yield [Request(messages, images)] * settings.n
    texts, first_tokens = tokens.read(outputs), outputs[0].completion_tokens
    groups = _same_answers([verify.extract_boxed(text) for text in texts])
    rounds = [_round(text) for text in texts]
    candidates = [_shown(text, settings.judge_source)[0] for text in texts]
    matches = []

    def in_both_orders(instructions: Iterable[tuple[str, str]]) -> list[Request]:
        """Each question as its instructions word it in one order, then in the other."""
        return [Request(ask(messages, text, settings.suffix), images) for both in instructions for text in both]

    if settings.tts == "weighted_vote":
        outputs = yield in_both_orders(
            tuple(pointwise_instruction(candidate, right_letter=letter) for letter in "AB") for candidate in candidates
        )
        judged = tokens.read(outputs)
        weights = []
        for i, replies in enumerate(zip(judged[::2], judged[1::2], strict=True)):
            weights.append(sum(_belief(reply, letter) for reply, letter in zip(replies, "AB", strict=True)) / 2)
            verdict = {0.0: "No", 1.0: "Yes"}.get(weights[i])
            rounds[i] = {**_round(texts[i], verdict, "\n---\n".join(replies)), "weight": weights[i]}
        groups.sort(key=lambda g: (-sum(weights[i] for i in g), -len(g)))
    elif settings.tts == "vote":
        groups.sort(key=lambda g: -len(g))
    else:
        while len(groups) > 1:
            pairs = list(zip(groups[::2], groups[1::2], strict=False))
            outputs = yield in_both_orders(
                tuple(pairwise_instruction(candidates[x[0]], candidates[y[0]]) for x, y in ((a, b), (b, a)))
                for a, b in pairs
            )
            judged = tokens.read(outputs)
            winners = []
            for (a, b), first, swapped in zip(pairs, judged[::2], judged[1::2], strict=True):
                verdicts = verify.parse_verdict(first), verify.parse_verdict(swapped)
                winner = {("A", "B"): a, ("B", "A"): b}.get(verdicts, max(a, b, key=len))  # equal votes: a, the earlier
                winners.append(winner)
                matches.append({
                    "a": a[0], "b": b[0], "verdict": verdicts[0], "verdict_swapped": verdicts[1],
                    "winner": winner[0], "judge_output": f"{first}\n---\n{swapped}",
                })  # fmt: skip
            groups = winners + groups[2 * len(pairs) :]
    chosen = groups[0][0]
    found = _final(row, texts[chosen], tokens, texts[0], first_tokens, rounds, round_num=0)
    return {**found, "chosen": chosen, "matches": matches}


def _belief(judged: str, right_letter: str) -> float:
    """What a pointwise verdict says of a response: 1 right, 0 wrong, 0.5 nothing, where it can't be read."""
    verdict = verify.parse_verdict(judged)
    if verdict in ("A", "B"):
        return float(verdict == right_letter)
    return {"Yes": 1.0, "No": 0.0}.get(verdict, 0.5)


def tts_row(row: Row, settings: Settings) -> Solver:
    return (reflect_row if settings.tts == "reflect" else sampled_row)(row, settings)


def _round(text: str, verdict: str | None = None, judged: str | None = None) -> Row:
    return {"answer": verify.extract_boxed(text), "output": text, "verdict": verdict, "judge_output": judged}


def _final(row: Row, text: str, tokens: _Tokens, first: str, first_tokens: int, rounds: list[Row], round_num: int):
    answer = verify.extract_boxed(first)
    return {
        **_scored(row, text, tokens),
        "round_num": round_num,  # reflections
        "rounds": rounds,
        "first_answer": answer,
        "first_is_correct": verify.is_equal(answer, row["solution"]),
        "first_completion_tokens": first_tokens,
    }


def _same_answers(answers: list[str | None]) -> list[list[int]]:
    """Positions of equal answers together, in order of appearance; those without a box only if there is no other."""
    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        for group in groups:
            if answer == answers[group[0]] or verify.is_equal(answer, answers[group[0]]):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups or [list(range(len(answers)))]


def judge_row(row: Row, settings: Settings) -> Solver:
    """A pair in both orders, or one response with its label."""
    tokens = _Tokens()
    messages, images = row["prompt"], tuple(row["images"])
    if row.get("response") is not None:
        shown, _ = _shown(row["response"], settings.judge_source)
        question = ask(messages, pointwise_instruction(shown), settings.suffix)
        (judged,) = tokens.read((yield [Request(question, images)]))
        verdict = verify.parse_verdict(judged)
        found = {"task": "pointwise", "label": row["label"], "verdict": verdict, "verdict_swapped": None}
        return {**_judged(row, judged, tokens), **found, "is_correct": verdict == found["label"]}

    chosen, _ = _shown(row["chosen"], settings.judge_source)
    asked = []
    for other in row["rejected"]:
        other, _ = _shown(other, settings.judge_source)
        for pair in ((chosen, other), (other, chosen)):
            asked.append(Request(ask(messages, pairwise_instruction(*pair), settings.suffix), images))
    outputs = tokens.read((yield asked))
    verdicts, swapped = ([verify.parse_verdict(text) for text in outputs[i::2]] for i in (0, 1))
    one = len(row["rejected"]) == 1
    return {
        **_judged(row, "\n---\n".join(outputs), tokens),
        "task": "pairwise" if one else "best_of_n",
        "label": "A",  # in the first order the chosen one is A, in the swapped order it is B
        "verdict": verdicts[0] if one else verdicts,
        "verdict_swapped": swapped[0] if one else swapped,
        "is_correct": all(v == "A" for v in verdicts) and all(v == "B" for v in swapped),
    }


def _common(row: Row, text: str, tokens: _Tokens) -> Row:
    return {
        "dataset": row["dataset"],
        "problem": row["problem"],
        "image_path": row["image_path"],
        "ground_truth": None if "chosen" in row or "response" in row else row["solution"],
        "vlm_output": text,
        "extracted_answer": None,
        "is_correct": None,
        "error": None,
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
    }


def _scored(row: Row, text: str, tokens: _Tokens) -> Row:
    answer = verify.extract_boxed(text)
    return {
        **_common(row, text, tokens),
        "extracted_answer": answer,
        "is_correct": verify.is_equal(answer, row["solution"]),
    }


def _judged(row: Row, text: str, tokens: _Tokens) -> Row:
    return {**_common(row, text, tokens), "extracted_answer": verify.extract_boxed(text)}


SOLVERS: dict[str, Callable[[Row, Settings], Solver]] = {"answer": answer_row, "tts": tts_row, "judge": judge_row}


# ---------------------------------------------------------------------------------------------------------------------
# Running rows


@dataclass
class _Running:
    """A row under way: its solver, the outputs of the calls it waits for, and how many are still out."""

    index: int
    row: Row
    solver: Solver
    outputs: list[Output | None]
    missing: int = 0
    calls: int = 0


def run(rows: Iterable[tuple[int, Row]], engine, settings: Settings) -> Iterator[list[tuple[int, Row]]]:
    """Yield [(index, result), ...] as rows finish, for (index, row) pairs. As many rows are under way as keep the
    engine busy; a row's next calls go out as soon as its last ones are back."""
    waiting, sampling = iter(rows), settings.sampling
    tickets = itertools.count()
    out: dict[int, tuple[_Running, int]] = {}  # ticket -> (row, place of the call among those it waits for)

    def advance(running: _Running, outputs: list[Output] | None) -> Row | None:
        try:
            requests = running.solver.send(outputs)
        except StopIteration as finished:
            return finished.value
        except RequestFailed as failure:
            return {**_common(running.row, "", _Tokens()), "error": str(failure)}
        running.outputs, running.missing = [None] * len(requests), len(requests)
        for place, request in enumerate(requests):
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
            advance(_Running(index, row, SOLVERS[settings.mode](row, settings), []), None)
        if not out:
            return
        finished = []
        for ticket, output in engine.finished():
            running, place = out.pop(ticket)
            running.outputs[place] = output
            running.missing -= 1
            if running.missing == 0 and (result := advance(running, running.outputs)) is not None:
                finished.append((running.index, result))
        yield finished


def _seed(*parts: int) -> int:
    """The same for the same call of the same row, whenever it is made."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


def evaluate(records: list[Row], engine, settings: Settings) -> list[Row]:
    """Results of `records`, in their order. For notebooks and scripts; nothing is written.

    The records are what a benchmark file would hold; images may also be PIL images. Raises BadInput for one that can't
    be used.
    """
    rows = read_benchmark(Source(records, rules=Rules(settings.suffix)), settings.mode)
    results: list[Row | None] = [None] * len(rows)
    for finished in run(enumerate(rows), engine, settings):
        for index, result in finished:
            results[index] = result
    return results


def read_benchmark(source: Source, mode: str) -> list[Row]:
    """The rows of a benchmark. An image is looked for, and opened when it is asked about.

    Raises BadInput for data that can't be read, and for rows that the mode can't use.
    """
    found = [row for _, _, row in Reader(source, "judge" if mode == "judge" else "answer", look=False)]
    bad = [row for row in found if isinstance(row, BadRow)]
    if bad:
        more = f"; {len(bad) - 1:,} more rows can't be used, python -m data.check names them" if len(bad) > 1 else ""
        raise BadInput(f"{source}: {bad[0]}{more}")
    if not found:
        raise BadInput(f"{source}: expected at least one row, found none")
    return found


def run_to_file(rows: list[Row], engine, settings: Settings, output: Path) -> list[Row]:
    """Evaluate what `output` does not hold yet; append each row as it finishes, then write the final JSON atomically.

    Raises BadInput if the file was made with other settings.
    """
    from tqdm.auto import tqdm

    part, header, done = resume(rows, settings, output)
    encode = json.JSONEncoder(ensure_ascii=False).encode
    texts: dict[int, str] = {}  # each result is written as JSON once, for both files

    def line(index: int, result: Row) -> str:
        texts[index] = encode(result)
        return f'{{"index": {index}, "result": {texts[index]}}}\n'

    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(part, "".join([json.dumps(header) + "\n", *itertools.starmap(line, done.items())]))

    todo = [i for i in range(len(rows)) if i not in done]
    bar = tqdm(total=len(rows), initial=len(done), desc=settings.mode, disable=None)  # on a terminal only
    with open(part, "a", encoding="utf-8") as log, bar:
        synced = time.monotonic()
        for finished in run(((i, rows[i]) for i in todo), engine, settings):
            done.update(finished)
            log.writelines(itertools.starmap(line, finished))
            log.flush()
            bar.update(len(finished))
            if time.monotonic() - synced > 1.0:
                os.fsync(log.fileno())
                synced = time.monotonic()
    lines = ",\n".join(texts[i] for i in range(len(rows)))
    write_atomically(output, f"[\n{lines}\n]\n")
    return [done[i] for i in range(len(rows))]


def resume(rows: list[Row], settings: Settings, output: Path) -> tuple[Path, Row, dict[int, Row]]:
    """OUTPUT.part, the header that it has for this run, and what it holds already: results without an error by row.

    Raises BadInput if it, or `output`, is of another run.
    """
    part = output.with_name(output.name + ".part")
    header = json.loads(json.dumps({**asdict(settings), "number of rows": len(rows), **contents(settings, rows)}))
    way_out = "give another --output or remove it"
    if output.is_dir():
        raise BadInput(f"{output}: expected a file, got a folder")
    if not part.exists():
        if output.exists():
            raise BadInput(f"{output}: exists, and has no {part.name} that says what made it; {way_out}")
        return part, header, {}
    try:
        lines = part.read_bytes().split(b"\n")[:-1]  # the last one was cut off while being written, maybe in a letter
        made, *entries = map(json.loads, lines)
        changed = [name for name in header if made.get(name) != header[name]]
        done = {entry["index"]: entry["result"] for entry in entries if entry["result"]["error"] is None}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{part}: expected what an evaluation has written; {way_out}") from None
    if changed:
        raise BadInput(f"{part}: made with another {', '.join(changed)}; {way_out}")
    return part, header, done


def contents(settings: Settings, rows: list[Row]) -> dict[str, str]:
    """Digests of the questions and, for a model in a folder, of its files: the same name may hold another model."""
    questions = hashlib.blake2b(digest_size=8)
    for row in rows:
        asked = {name: value for name, value in row.items() if name not in ("images", "source", "task")}
        budgets = [(image["min_pixels"], image["max_pixels"]) for image in row["images"]]
        questions.update(json.dumps([asked, budgets], sort_keys=True).encode())
        for image in row["images"]:  # a file by its name, wherever it lies
            questions.update(image["bytes"] or os.path.basename(image["path"]).encode())
    digests = {"benchmark contents": questions.hexdigest()}
    folder = Path(settings.model)
    if settings.engine != "server" and folder.is_dir():
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin")):
            with open(file, "rb") as opened:
                digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(1 << 20))
        digests["model contents"] = digest.hexdigest()
    return digests


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def make_engine(args: argparse.Namespace):
    """The engine that the command line asks for."""
    if args.engine == "server":
        from engines import ServerEngine

        return ServerEngine(args.server, args.served_model or args.model, args.concurrency, args.timeout)
    if args.engine == "vllm":
        from engines import VLLMEngine

        return VLLMEngine(args.model, dtype=args.dtype, max_model_len=args.max_model_len)
    from transformers import set_seed

    from engines import TransformersEngine

    set_seed(args.seed)
    return TransformersEngine(args.model, batch_size=args.batch_size, dtype=args.dtype)


def choose_engine(args: argparse.Namespace) -> str:
    """`auto`: servers if there are any; vLLM where it is installed beside a GPU; else transformers."""
    from importlib.util import find_spec

    if args.engine == "vllm" and not find_spec("vllm"):
        raise BadInput("--engine vllm: expected vLLM to be installed (requirements.txt has its version)")
    if args.engine != "auto":
        return args.engine
    if args.server:
        return "server"
    if find_spec("vllm"):
        import torch

        if torch.cuda.is_available():
            return "vllm"
    return "transformers"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--benchmark", required=True, nargs="+", help="files (data/README.md), folders or hub names")
    parser.add_argument("--mode", choices=MODES, default="answer")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument("--max_tokens", type=int, default=2048)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--tts", choices=TTS, default="reflect", help="mode tts: how")
    parser.add_argument("--max_rounds", type=int, default=2, help="tts reflect: reflections at most")
    parser.add_argument("--n", type=int, default=8, help="tts vote, weighted_vote, best_of_n: answers per question")
    parser.add_argument("--judge_source", choices=("cot", "answer"), default="cot", help="what a judge sees")
    parser.add_argument("--limit", type=int, help="rows at most, of each benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="vllm, transformers: auto is the model's own, float32 on a CPU",
    )
    parser.add_argument("--batch_size", type=int, default=128, help="transformers")
    parser.add_argument("--max_model_len", type=int, help="vllm: longest prompt and completion together")
    parser.add_argument("--server", nargs="+", default=[], help="server: URLs; the key is read from OPENAI_API_KEY")
    parser.add_argument("--served_model", help="server: the name the model has there (default: --model)")
    parser.add_argument("--concurrency", type=int, default=64, help="server: requests under way, over all URLs")
    parser.add_argument("--timeout", type=float, default=600.0, help="server: seconds for one try")
    add_source_flags(parser, split="test")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    args = parser.parse_args()

    from safetensors import SafetensorError

    try:
        for name, least in LEAST.items():
            if (value := getattr(args, name)) is not None and not least <= value < math.inf:
                raise BadInput(f"--{name}: expected a number from {least} on, got {value}")
        args.engine = choose_engine(args)
        if args.engine == "server" and not args.server:
            raise BadInput("--engine server: expected --server URL")
        if args.mode == "tts" and args.tts != "reflect" and args.temperature == 0:
            raise BadInput(f"--tts {args.tts}: expected a --temperature above 0, or all answers are the same")
        if args.engine != "server" and (Path(args.model) / "adapter_config.json").is_file():
            raise BadInput(
                f"--model {args.model}: expected a model, got an adapter (LoRA); python -m training.merge {args.model} "
                f"makes a model of it, in {args.model}/merged"
            )
        settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__ if name in args})
        settings = replace(settings, benchmark=tuple(args.benchmark))
        rows = [
            row for name in args.benchmark for row in read_benchmark(source_of(name, args), args.mode)[: args.limit]
        ]
        resume(rows, settings, args.output)  # refused now, and not when the model is loaded
        try:
            engine = make_engine(args)
        except BadInput:
            raise
        except (ValueError, SafetensorError) as error:  # transformers' and vLLM's, about a model that they can't load
            raise BadInput(f"--model {args.model}: {error}") from error
        try:
            results = run_to_file(rows, engine, settings, args.output)
        finally:
            engine.close()
    except (BadInput, OSError) as error:
        print(f"evaluate.py: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    failed = sum(result["error"] is not None for result in results)
    print(f"{len(results)} rows, {failed} failed; python calculate_acc.py --result_path {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
