"""The measures of benchmarks/measures.py and of the demo, by hand: what a judge that knows the answer makes of them."""

import re

import pytest

import demo
import verify
from benchmarks import measures
from engines import BatchEngine, Output

QUESTION = {"dataset": "d", "problem": "1+2?", "image_path": None}
BENCHMARK = {
    "answers": [{**QUESTION, "answer": "3"}],
    "pairs": [{**QUESTION, "chosen": "3", "rejected": "5"}],
    "points": [{**QUESTION, "response": "3", "label": "Yes"}, {**QUESTION, "response": "5", "label": "No"}],
}


class Oracle(BatchEngine):
    """Answers `drawn` in turn; as a judge it knows that 3 is right, and it reflects to 3. Two tokens each."""

    drawn = ""

    def __init__(self, *args, **kwargs):
        super().__init__(256)
        self._left = iter(self.drawn)

    def batch(self, requests, sampling):
        return [Output(f"\\boxed{{{self._say(request.messages[-1]['content'])}}}", 1, 2) for request in requests]

    def _say(self, text):
        quotes = re.findall(r"<response\w*>\n(.*?)\n</response", text, re.DOTALL)
        right = [(verify.extract_boxed(quote) or quote) == "3" for quote in quotes]
        if len(quotes) == 2:
            return "A" if right[0] else "B"
        if "A: " in text:
            return "A" if right[0] == ("A: correct" in text) else "B"
        if "Yes" in text:
            return "Yes" if right[0] else "No"
        return "3" if quotes else next(self._left)


def test_the_measures_by_hand(monkeypatch):
    monkeypatch.setattr(Oracle, "drawn", "55373333")
    monkeypatch.setattr(measures, "TransformersEngine", Oracle)
    task = measures.Task(None, measures.by_answer, verify.verify_many, 8)
    found = measures.measure("x", task, BENCHMARK, 1.0)
    expected = {
        "first answer": 5 / 8,
        "judge, own answers": 1,
        "judge, own boxed answers": 1,
        "pairwise, both orders": 1,
        "reflection fixes a wrong answer": 1,
        "reflection harms a right answer": 0,
        "final answer, reflecting on a No": 1,
        "vote of 4": 0,
        "vote of 8": 1,
        "vote of 4 weighed by verdicts": 1,
        "vote of 4 weighed by greedy verdicts": 1,
        "best of 4 by pairs": 1,
    }
    assert {name: found["measures"][name]["mean"] for name in expected} == expected
    assert found["price"]["final answer, reflecting on a No"] == 2 + 2 + 0.75 * 2
    assert found["price"]["best of 4 by pairs"] == 4 * 2 + 2 * 2 * 2


def test_a_request_that_fails_is_no_wrong_answer():
    class Full(Oracle):
        def batch(self, requests, sampling):
            return [Output(error="too long") for _ in requests]

    task = measures.Task(None, measures.by_answer, verify.verify_many, 8)
    with pytest.raises(RuntimeError, match="answer: too long"):
        measures.measure(Full(), task, BENCHMARK, 0.0)


def test_the_demos_measures_by_hand(monkeypatch):
    monkeypatch.setattr(Oracle, "drawn", "53")
    monkeypatch.setattr(demo, "TransformersEngine", Oracle)
    found = demo.measure("x", BENCHMARK, samples=2)["measures"]
    assert {name: value["mean"] for name, value in found.items()} == {
        "policy accuracy": 0.5,
        "pointwise balanced accuracy": 1,
        "pointwise, own answers": 1,
        "pairwise accuracy, both orders": 1,
        "reflection fixes a wrong answer": 1,
        "reflection harms a right answer": 0,
        "test-time scaling, final answer": 1,
        "test-time scaling minus first": 0.5,
    }
