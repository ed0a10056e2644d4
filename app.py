"""A page to talk to a model: it answers, judges its own answer, and thinks again where the verdict is no.

    make app                                                     runs/demo/spark, or the shipped start without it
    python app.py MODEL [--run RUN_DIR]                          a checkpoint, or what LoRA training saved
    python app.py NAME --server http://host:8000                 an OpenAI-compatible server (key in OPENAI_API_KEY)

Three tabs: one answer and what becomes of it, shown while it is written (evaluate.py's `--tts reflect`); n answers,
their votes and the knock-out between them (`--tts best_of_n`); what a training run rolled out and recycled.

It listens on this machine alone: another --host, or --share, needs --auth. What users and models write is shown as
text, with nothing but maths rendered.
"""

import json
import math
import os
import queue
import re
import string
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import verify
from data.cli import Parser, refuse
from data.rows import BadInput, Source
from engines import Output, Request, Sampling, TransformersEngine, complete
from evaluate import read_benchmark
from evaluation.server import BROKEN_OFF, ELSEWHERE, ServerEngine, api_url, no_answer, text_of
from evaluation.settings import Settings
from evaluation.solvers import reflect_row, same_answers, sampled_row, verdict_probability
from prompts import PROMPT_SUFFIX, strip_suffix
from reporting.hostile import image, visible
from reporting.runs import TASK_TITLES, read_table
from training.merge import merged

DEMO, START = "runs/demo/spark", "models/digits"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
REFRESH = 0.1  # seconds between two states of a text being written
EXAMPLES = 4
CSS = """.picture img { image-rendering: pixelated; min-height: 120px; object-fit: contain }
.or, [role=tab] { color: var(--body-text-color) !important }"""
MAX_QUESTION = 20_000  # characters
RANGES = {  # setting -> (from, to, step, default, label)
    "temperature": (0, 2, 0.1, 1.0, "Temperature"),
    "max_tokens": (16, 4096, 16, 512, "Max tokens per reply"),
    "max_rounds": (0, 5, 1, 2, "Max reflections"),
    "n": (2, 16, 1, 8, "Answers to choose from"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Where completions come from: `stream` yields the text as it grows, then the Output


class Local:
    """A model in this process: one call at a time, whoever makes it."""

    def __init__(self, model: str):
        import torch

        if (Path(model) / "adapter_config.json").is_file():
            device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", "float32")
            loaded, processor = merged(model, dtype)
            self.engine = TransformersEngine(loaded.to(device), processor)
        else:
            self.engine = TransformersEngine(model)
        self.lock = threading.Lock()

    def write(self, requests: list[Request], sampling: Sampling, **more: Any) -> list[Output]:
        with self.lock:
            return self.engine.batch(requests, sampling, **more)

    def stream(self, request: Request, sampling: Sampling) -> Iterator[str | Output]:
        import torch

        states: queue.Queue[Any] = queue.Queue()  # all tokens after each new one, then the Output or an error
        gone = threading.Event()  # the user has left

        def tap(ids, scores, **kwargs):  # a stopping criterion
            states.put(ids[0].tolist())
            return torch.full((1,), gone.is_set(), device=ids.device)

        def write():
            try:
                states.put(self.write([request], sampling, stopping_criteria=[tap])[0])
            except Exception as error:  # raised in the user's thread
                states.put(error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        prompt_length, shown = 0, 0.0
        try:
            while isinstance(state := states.get(), list):
                prompt_length = prompt_length or len(state) - 1
                if time.monotonic() - shown > REFRESH:
                    shown = time.monotonic()
                    yield self.engine.tokenizer.decode(state[prompt_length:], skip_special_tokens=True)
        finally:
            gone.set()
            thread.join()
        if isinstance(state, Exception):
            raise state
        yield state


class Remote:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, model: str):
        self.address = f"{api_url(url)}/chat/completions"
        self.connect = partial(ServerEngine, [url], model, retries=2, patience=15.0)
        self.engine = self.connect()

    def write(self, requests: list[Request], sampling: Sampling) -> list[Output]:
        with closing(self.connect()) as engine:  # not shared: `complete` would get other users' outputs too
            return complete(engine, requests, sampling)

    def stream(self, request: Request, sampling: Sampling) -> Iterator[str | Output]:
        import httpx

        body = self.engine._body(request, sampling) | {"stream": True, "stream_options": {"include_usage": True}}
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        text, thoughts, tokens, usage, shown = "", "", [], {}, 0.0
        reason = elsewhere = None
        with httpx.stream("POST", self.address, json=body, headers=headers, timeout=600) as response:
            status = response.status_code
            if status in (400, 422, 429) or status >= 500:  # for a field, or for now: the engine knows what to do
                yield from self.write([request], sampling)
                return
            if status != 200:
                raise BadInput(f"the server answered {status}: {response.read()[:300].decode(errors='replace')}")
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or not data:
                    continue
                if data == "[DONE]":
                    reason = reason or "stop"
                    break
                event = json.loads(data)
                if not isinstance(event, dict) or event.get("error") or "choices" not in event:
                    raise BadInput(f"the server answered: {data[:300]}")
                usage = event.get("usage") or usage
                for choice in event["choices"] or []:
                    delta = choice.get("delta") or {}
                    text += text_of(delta.get("content"))
                    elsewhere = next((name for name in ELSEWHERE if delta.get(name)), elsewhere)
                    thoughts += delta.get("reasoning_content") or delta.get("reasoning") or ""
                    tokens += (choice.get("logprobs") or {}).get("content") or []
                    reason = choice.get("finish_reason") or reason
                if time.monotonic() - shown > REFRESH:
                    shown = time.monotonic()
                    yield text or thoughts
        if reason is None or reason in BROKEN_OFF:
            raise BadInput("the server broke off its answer")
        counts = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        logprobs = tuple((each["token"], each["logprob"]) for each in tokens) or None
        yield Output(text, *counts, no_answer(text, reason, elsewhere), logprobs, cut_off=reason == "length")


# ---------------------------------------------------------------------------------------------------------------------
# Text by users and models

_MATHS = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)|(\\boxed\{(?:[^{}]|\{[^{}]*\})*\})",
    re.DOTALL,
)
DELIMITERS = [  # that no text has: `inert` replaces them
    {"left": "\ue000", "right": "\ue001", "display": True},
    {"left": "\ue002", "right": "\ue003", "display": False},
]


def inert(text: str) -> str:
    """Markdown that shows `text` as it is, with its maths rendered: all other punctuation becomes HTML entities."""
    text = re.sub("[\ue000-\ue003]", "\ufffd", visible(text))
    parts, end = [], 0
    for match in _MATHS.finditer(text):
        maths = next(group for group in match.groups() if group is not None).replace("\n", " ")
        maths = re.sub(r"^\\boxed\{([A-Za-z ]+)\}$", r"\\boxed{\\text{\1}}", maths)
        marks = DELIMITERS[not (match[1] or match[2])]
        parts += [_entities(text[end : match.start()]), marks["left"], _entities(maths), marks["right"]]
        end = match.end()
    return "".join([*parts, _entities(text[end:])])


def _entities(text: str) -> str:
    return "".join("<br>" if c == "\n" else f"&#{ord(c)};" if c in string.punctuation else c for c in text)


def told(error: Exception) -> str:
    """A failure as a line of the page; logged to stderr."""
    message = " ".join(str(error).split())
    print(f"app.py: {type(error).__name__}: {message}", file=sys.stderr)
    return f"**Not answered:** {inert(message[:500] or type(error).__name__)}"


# ---------------------------------------------------------------------------------------------------------------------
# The first two tabs: generators of Markdown


class Page:
    """The functions behind the first two tabs. No state between calls: users can't see each other's."""

    def __init__(self, backend, suffix: str):
        self.backend, self.suffix = backend, suffix

    def talk(self, question, picture, gold, rounds, temperature, length) -> Iterator[str]:
        """Answer, verdict, reflection, verdict, ..., as they are written."""
        parts: list[str] = []
        try:
            settings = self._settings(temperature=temperature, max_tokens=length, max_rounds=rounds)
            solver = reflect_row(self._row(question, picture), settings)
            (request,) = next(solver)
            judging = False
            while True:
                start = time.monotonic()
                name = "Verdict" if judging else "Reflection" if parts else "Answer"
                for state in self.backend.stream(request._replace(with_logprobs=judging), settings.sampling):
                    if isinstance(state, str):
                        yield "\n\n".join([*parts, f"### {name} …\n\n{inert(state)}"])
                if state.error:
                    raise BadInput(state.error)
                heading = f"### {name}{told_verdict(state) if judging else correctness(state.text, gold)}"
                counts = f"{state.completion_tokens} tokens, {time.monotonic() - start:.1f} s"
                if state.cut_off:
                    counts += f", cut off at {length} tokens"
                parts.append(f"{heading}\n\n{inert(state.text)}\n\n<small>{counts}</small>")
                yield "\n\n".join(parts)
                judging = not judging and verify.extract_boxed(state.text) is not None
                (request,) = solver.send([state])
        except StopIteration as finished:
            answer = finished.value["extracted_answer"]
            parts.append(f"### Final answer: {'no boxed answer' if answer is None else inert(answer)}")
        except Exception as error:
            parts.append(told(error))
        yield "\n\n".join(parts)

    def vote(self, question, picture, gold, n, temperature, length) -> Iterator[str]:
        """n answers, their votes, and the knock-out between those that differ."""
        try:
            settings = replace(self._settings(temperature=temperature, max_tokens=length, n=n), tts="best_of_n")
            if temperature == 0:
                raise BadInput("temperature: expected more than 0, or all answers are the same")
            solver = sampled_row(self._row(question, picture), settings)
            requests, start = next(solver), time.monotonic()
            yield f"{len(requests)} answers are being drawn …"
            while True:
                outputs = self.backend.write(requests, settings.sampling)
                if failed := next((output.error for output in outputs if output.error), None):
                    raise BadInput(failed)
                requests = solver.send(outputs)
                yield f"{len(requests) // 2} pairs are being judged, each in both orders …"
        except StopIteration as finished:
            yield election(finished.value, gold) + f"\n\n<small>{time.monotonic() - start:.1f} s</small>"
        except Exception as error:
            yield told(error)

    def _row(self, question: str, picture: dict[str, Any] | None) -> dict[str, Any]:
        from gradio.utils import get_upload_folder

        if not isinstance(question, str) or not 0 < len(question.strip()) <= MAX_QUESTION:
            raise BadInput(f"expected a question of 1 to {MAX_QUESTION:,} characters")
        if picture and not Path(picture["path"]).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            raise BadInput("expected an image that was uploaded")
        record = {"dataset": "app", "problem": question, "image_path": picture["path"] if picture else None}
        record["answer"] = "unknown"  # benchmarks need one; `correctness` uses the user's
        (row,) = read_benchmark(Source([record], suffix=self.suffix), "answer")
        return row

    def _settings(self, **values: Any) -> Settings:
        for name, value in values.items():
            low, high, step, *_ = RANGES[name]
            if not low <= value <= high:
                raise BadInput(f"{name}: expected {low} to {high}, got {value}")
            values[name] = int(value) if step >= 1 else value
        return Settings("app", "tts", prompt_suffix=self.suffix, **values)


def told_verdict(output: Output) -> str:
    """A verdict and its probability."""
    verdict = verify.parse_verdict(output.text)
    chance = verdict and verdict_probability(output, verdict)
    sure = "" if chance is None else f", probability {chance:.2f}"
    return {"Yes": f": ✓ correct{sure}", "No": f": ✗ not correct{sure}"}.get(verdict, ": unreadable")


def correctness(text: str, gold: str) -> str:
    """Whether an answer is right, if the user gave the right one."""
    right = verify.is_equal(verify.extract_boxed(text), gold) if gold.strip() else None
    return {True: " (right)", False: " (wrong)", None: ""}[right]


def election(result: dict[str, Any], gold: str) -> str:
    """The chosen answer, the votes, the matches and all answers."""
    rounds, matches, chosen = result["rounds"], result["matches"], result["chosen"]
    answers = [each["answer"] for each in rounds]
    unboxed = [i for i, answer in enumerate(answers) if answer is None]
    groups = same_answers(answers, verify.verify_many) + ([unboxed] if unboxed else [])

    def name(i: int) -> str:
        return "no box" if answers[i] is None else inert(answers[i])

    lines = [f"### Chosen: {name(chosen)}{correctness(rounds[chosen]['output'], gold)}", "### Votes"]
    for group in sorted(groups, key=len, reverse=True):
        lines.append(f"- **{name(group[0])}**: {len(group)} of {len(answers)} {'●' * len(group)}")
    lines.append("### Knock-out, each pair judged in both orders")
    for match in matches:
        agree = {match["verdict"], match["verdict_swapped"]} == {"A", "B"}
        how = "both orders agree" if agree else "the two orders disagree, so the votes decide"
        lines.append(f"- {name(match['a'])} against {name(match['b'])}: **{name(match['winner'])}** ({how})")
    if not matches:
        lines.append("- all answers are the same, so there is nothing to judge")
    lines.append("### Answers")
    lines += [f"{i + 1}. {inert(each['output'])}" for i, each in enumerate(rounds)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The third tab: a training run


def logged_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in (run / "completions").glob("completions_*.parquet"))


def table(run: Path, kind: str, step: int) -> list[dict[str, Any]]:
    """A step's policy ("completions") or recycled rollouts; none without a table. Raises BadInput for a broken one."""
    path, notes = run / "completions" / f"{kind}_{step:05d}.parquet", []
    rows = read_table(path, "answer" if kind == "completions" else None, notes) if path.exists() else []
    if notes:
        raise BadInput(notes[0])
    return rows


def by_question(run: Path, step: int) -> list[list[dict[str, Any]]]:
    """A step's policy rollouts, a list a question."""
    rows = table(run, "completions", step)
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["prompt"])]
    size = min(map(len, groups), default=1)  # neighbours with the same words and different images are two questions
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def family(run: Path, step: int, number: int, suffix: str) -> str:
    """The rollouts of a question and what was recycled from them, as Markdown."""
    groups = by_question(run, step)
    if not (isinstance(number, int) and 0 <= number < len(groups)):
        raise BadInput(f"expected a question from 0 to {len(groups) - 1}, got {number}")
    question, asked = strip_suffix(groups[number][0]["prompt"], suffix), None

    def line(row: dict[str, Any]) -> str:
        mark = "–" if math.isnan(row["reward"]) else "✓" if row["reward"] >= 1 else "✗"
        return f"- {mark} {inert(row['completion'])}"

    lines = [f"### Step {step}: {inert(question)}", f"#### {len(groups[number])} rollouts", *map(line, groups[number])]
    for row in table(run, "recycled", step):
        if row["question"] != number:
            continue
        if row["prompt"] != asked:
            asked = row["prompt"]
            lines.append(f"#### Recycled: {TASK_TITLES.get(row['task'], inert(row['task']))}")
            sources = (image(data).get("source") for data in row["images"])
            lines += [f"![The image of the question]({source})" for source in sources if source]
            lines.append(f"> {inert(asked[len(question) :].strip())}\n")
            if isinstance(row["label"], str):
                lines.append(f"Label: **{inert(row['label'])}**\n")
        lines.append(line(row))
    if asked is None:
        lines.append("#### Nothing was recycled from these")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def examples(folder: Path) -> list[list[Any]]:
    """[question, image file, answer] of held-out digits; the images are saved in `folder`."""
    from demo import held_out

    rows = [row for row in held_out(4 * EXAMPLES)["answers"] if row["image_path"] is not None][:EXAMPLES]
    for i, row in enumerate(rows):
        row["image_path"].save(folder / f"{i}.png")
    return [[row["problem"], str(folder / f"{i}.png"), row["answer"]] for i, row in enumerate(rows)]


def build(page: Page, name: str, run: Path | None, folder: Path):
    """The Gradio app. `folder` is for the examples' images."""
    import gradio as gr

    def written(label: str):
        return gr.Markdown(label=label, latex_delimiters=DELIMITERS, elem_classes="written", min_height=80)

    with gr.Blocks(title=f"SPARK: {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(
            f"# Talk to {inert(name)}\nIt answers, judges its own answer, and thinks again if the verdict is no."
        )
        with gr.Row():
            with gr.Column(scale=2):
                question = gr.Textbox(label="Question", lines=3, max_length=MAX_QUESTION)
                picture = gr.Image(label="Image (optional)", height=180, elem_classes="picture", sources=["upload"])
                gold = gr.Textbox(label="Right answer (optional)", max_lines=1)
                with gr.Accordion("Settings", open=False):
                    temperature, length, rounds, n = (
                        gr.Slider(low, high, default, step=step, label=label)
                        for low, high, step, default, label in RANGES.values()
                    )
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Answer, judge, reflect"):
                    ask = gr.Button("Ask", variant="primary")
                    rounds_out = written("Rounds")
                with gr.Tab("Several answers"):
                    draw = gr.Button("Draw answers", variant="primary")
                    votes_out = written("Votes")
                with gr.Tab("Training rollouts"):
                    browse(gr, run, page.suffix, written)
        gr.Examples(examples(folder), [question, picture, gold], label="Held-out digits")
        given, how = [question, picture, gold], {"preprocess": False, "concurrency_limit": 8}  # Page checks its input
        talk = ([*given, rounds, temperature, length], rounds_out)
        ask.click(page.talk, *talk, api_name="talk", **how)
        question.submit(page.talk, *talk, api_visibility="private", **how)
        draw.click(page.vote, [*given, n, temperature, length], votes_out, api_name="vote", **how)
    return blocks


def browse(gr, run: Path | None, suffix: str, written) -> None:
    """The third tab."""
    steps = logged_steps(run) if run else []
    if not steps:
        gr.Markdown("No rollouts here: pass `--run` the folder of a run that was trained with `log_completions`.")
        return

    def choices(step: int) -> list[tuple[str, int]]:
        """The step's questions; none where its table is being written, or was cut off with the run."""
        try:
            groups = by_question(run, step)
        except BadInput:
            return []
        names = []
        for i, group in enumerate(groups):
            right = sum(row["reward"] >= 1 for row in group)
            words = visible(strip_suffix(group[0]["prompt"], suffix))[:80]
            names.append((f"{i + 1}. {words} ({right} of {len(group)} right)", i))
        return names

    def show(step: int, number: int) -> str:
        try:
            return family(run, step, number, suffix)
        except Exception as error:
            return told(error)

    newest = next((step for step in reversed(steps) if choices(step)), steps[-1])
    step = gr.Dropdown([(str(step), step) for step in steps], value=newest, label="Step")
    offered = choices(newest)
    question = gr.Dropdown(offered, value=0 if offered else None, label="Question")
    text = written("Rollouts")
    text.value = show(newest, 0)
    step.change(lambda step: gr.Dropdown(choices(step), value=0), step, question, api_visibility="private").then(
        show, [step, question], text, api_visibility="private"
    )
    question.change(show, [step, question], text, api_name="rollouts")


def launch(blocks, folder: Path, **how: Any) -> None:
    """Serve the page; `how` is Gradio's, with 127.0.0.1 as the default address."""
    import gradio as gr

    button = {"background_fill": "*primary_700", "background_fill_hover": "*primary_800", "text_color": "white"}
    button = {f"button_primary_{name}{mode}": colour for name, colour in button.items() for mode in ("", "_dark")}
    blocks.queue(max_size=64).launch(
        **{"server_name": "127.0.0.1", **how}, quiet=True, prevent_thread_lock=True, max_file_size="32mb",
        footer_links=[], allowed_paths=[str(folder)], css=CSS,
        theme=gr.themes.Default(primary_hue="blue").set(**button),
    )  # fmt: skip


def main() -> int:
    parser = Parser(__doc__)
    default = DEMO if (Path(DEMO) / "model.safetensors").is_file() else START
    parser.add_argument("model", nargs="?", default=default, help=f"a folder, or a name (default here: {default})")
    parser.add_argument("--server", help="URL of an OpenAI-compatible server, which knows the model by that name")
    parser.add_argument("--run", help="folder of the training run to show; default: the model's, if it is a run")
    parser.add_argument("--prompt_suffix", default=PROMPT_SUFFIX, help="what questions end with; as in training")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="a public address, through Gradio's tunnel")
    parser.add_argument("--auth", help="USER:PASSWORD, which the page then asks for")
    args = parser.parse_args()
    user, _, password = (args.auth or "").partition(":")
    if args.auth is not None and not (user and password):
        parser.error("--auth: expected USER:PASSWORD")
    if (args.share or args.host not in LOCAL_HOSTS) and not args.auth:
        parser.error("--share and another --host need --auth USER:PASSWORD: without it, anybody could use the page")
    run = Path(args.run or args.model)
    if args.run and not logged_steps(run):
        parser.error(f"--run: {run} has no completions/completions_*.parquet; expected a run with log_completions")
    try:
        if not args.server:
            from training.settings import check_weights

            check_weights(args.model, "model")
        backend = Remote(args.server, args.model) if args.server else Local(args.model)
        with tempfile.TemporaryDirectory() as folder:
            blocks = build(Page(backend, args.prompt_suffix), args.model, run, Path(folder))
            launch(
                blocks, Path(folder), server_name=args.host, server_port=args.port, share=args.share,
                auth=(user, password) if args.auth else None,
            )  # fmt: skip
            print(f"{args.model}: {blocks.share_url or blocks.local_url}   (Ctrl-C ends)", flush=True)
            blocks.block_thread()
            backend.engine.close()
    except (BadInput, OSError, ValueError) as error:
        return refuse("app.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
