"""verify.py: extraction, verdicts, equality on labelled pairs, the batch call and the rewards."""

import json
import logging
import random
from pathlib import Path

import pytest

import verify
from answers import workers
from answers.rules import decide

_FILE = Path(__file__).parent / "data" / "verify_pairs.jsonl"
PAIRS = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed { 7 }", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5", "5"),
        (r"\boxed 5. Done", "5"),
        (r"$\boxed5$", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1\}", None),  # an escaped brace closes nothing
        (r"\boxed{\text{a } b}", r"\text{a } b"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"{ unclosed \boxed{5}", "5"),
        (r"\boxed{5} and, cut off, \boxed{6", "5"),
        (r"\boxed{5", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed{5} then \boxed{}", None),
        (r"\boxed", None),
        (r"\boxedfoo{5}", None),
        ("the answer is 42", None),
        ("#### 42", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text, content):
    assert verify.extract_boxed(text) == content


# --------------------------------------------------------------------------- verdicts

FORMS = [
    "{}",
    "{}.",
    "**{}**",
    r"\text{{{}}}",
    r"\textbf{{{}}}",
    "({})",
    r"\text{{({})}}",
    "`{}`",
    " {} ",
    "Answer: {}",
    r"\mathrm{{{}}}",
]


@pytest.mark.parametrize("verdict", ["Yes", "No", "A", "B"])
@pytest.mark.parametrize("form", FORMS)
def test_a_decorated_verdict_is_read(verdict, form):
    for word in (verdict, verdict.lower(), verdict.upper()):
        assert verify.parse_verdict(form.format(word)) == verdict
        assert verify.parse_verdict(rf"I think so. Final: \boxed{{{form.format(word)}}} .") == verdict


@pytest.mark.parametrize(
    "text",
    [
        "",
        "maybe",
        "Yes and No",
        "Yes or No",
        "A or B",
        "AB",
        "C",
        "Not A",
        "No way",
        "Yes, because it is right",
        "yesterday",
        "Nope",
        r"\boxed{Yes",
        r"\boxed{}",
        r"\boxed{C}",
        r"\boxed{Yes} \boxed{maybe}",
        "I say Yes.",
        "The first one is A, the second B",
        r"\boxed{A, B}",
        "Yes" * 100,
        "\x00",
        "1",
        "true",
    ],
)
def test_anything_else_is_no_verdict(text):
    assert verify.parse_verdict(text) is None


def test_the_last_box_is_the_verdict():
    assert verify.parse_verdict(r"first \boxed{No}, on reflection \boxed{\text{Yes}}") == "Yes"


# --------------------------------------------------------------------------- equality


def test_every_labelled_pair_gets_its_verdict():
    """Every pair as labelled, but for those marked as missed, which are equal and refused."""
    results = verify.explain_many([(row["pred"], row["gold"]) for row in PAIRS], timeout=60)
    wrong = [(row, r) for row, r in zip(PAIRS, results, strict=True) if r.verdict is not row["equal"]]
    assert [row for row, _ in wrong] == [row for row in PAIRS if "missed" in row], wrong
    positives = sum(row["equal"] for row in PAIRS)
    assert all(row["equal"] for row, _ in wrong), "no false positives"
    assert len(wrong) / positives < 0.005
    assert min(positives, len(PAIRS) - positives) > 1900
    assert len({row["kind"] for row in PAIRS}) >= 50


def test_most_pairs_never_reach_a_worker():
    results = [decide(row["pred"], row["gold"]) for row in PAIRS if isinstance(row["gold"], str)]
    assert results.count(None) < 0.15 * len(results)


@pytest.mark.parametrize(
    ("pred", "gold", "equal"),
    [
        # What math-verify 0.9.0 gets wrong, or what its defaults are too generous for.
        ("10", "2x = 10", False),
        ("2x = 10", "10", False),
        ("0", "10^{-20}", False),
        (r"e^{\pi\sqrt{163}}", "262537412640768744", False),
        ("0.333", r"\frac{1}{3}", False),
        (r"\{1,2\}", "(1,2)", False),
        ("silent", "listen", False),
        ("[1,2)", "(1,2]", False),
        ("12.5", r"12.5\%", True),
        ("1,234", "(1,234)", False),
        ("pi", r"\pi", True),
        (r"\pi", "3.14", True),
        ("3.14", r"\pi", False),
        ("X", "x", False),
    ],
)
def test_pairs_that_math_verify_alone_gets_wrong(pred, gold, equal):
    assert verify.is_equal(pred, gold) is equal


@pytest.mark.parametrize(
    ("pred", "gold", "equal"),
    [
        ("3.14159", "3.14", True),  # rounds to the gold at the gold's precision
        ("3.145", "3.14", False),  # half up
        ("3.135", "3.14", True),
        ("3.1", "3.14", False),
        ("0.254", "0.25", False),  # two significant digits say nothing about a third
        (r"\frac{1}{3}", "0.33", True),
        ("0.46", "0.5", False),
        ("-3.14159", "-3.14", True),
        ("2.0000001", "2", False),
    ],
)
def test_a_decimal_gold_is_compared_at_its_own_precision(pred, gold, equal):
    assert verify.is_equal(pred, gold) is equal


@pytest.mark.parametrize(
    ("pred", "gold", "equal"),
    [
        ("0.571429", r"\frac{4}{7}", True),  # six digits of an exact gold, rounded
        ("0.571428", r"\frac{4}{7}", False),  # cut off
        ("0.57143", r"\frac{4}{7}", False),
        ("0.571", r"\frac{4}{7}", False),
        ("0.00571429", r"\frac{4}{700}", True),  # leading zeros do not count
        ("0.005714", r"\frac{4}{700}", False),
        ("2.23607", r"\sqrt{5}", True),
        ("2.2361", r"\sqrt{5}", False),
        ("(2.2361, 3)", r"(\sqrt{5}, 3)", True),  # five where another part is right too
        ("(2.236, 3)", r"(\sqrt{5}, 3)", False),
        ("(2.2361, 3.0001)", r"(\sqrt{5}, 3)", False),
        ("x = 2.2361", r"x = \sqrt{5}", False),  # an equation has one part
        ("6.9999999", "7", False),
        ("0.00000001", "10^{-20}", False),
        ("0.5714286x", r"\frac{4}{7}x", False),
        ("0.571429", "0.5714286", False),  # a decimal gold has its own precision
    ],
)
def test_a_rounded_decimal_may_stand_for_an_exact_gold(pred, gold, equal):
    assert verify.is_equal(pred, gold) is equal


@pytest.mark.parametrize("pred", [r"\ln(0)", r"-\ln(0)", r"x+\ln(0)", "ln 0"])
@pytest.mark.parametrize("gold", ["5", "3.14", "x^2", r"\sqrt{2}", "y = 5"])
def test_an_infinite_value_equals_nothing(pred, gold):
    assert verify.is_equal(pred, gold) is False


def test_what_is_divided_by_an_infinite_value_is_not_zero():
    assert verify.is_equal(r"\frac{1}{\ln 0}", "0") is False


@pytest.mark.parametrize("gold", [None, "", "   ", [], [None, ""], float("nan"), True, "$$", r"\boxed{}"])
def test_a_pair_without_a_usable_gold_is_unscorable(gold):
    assert verify.is_equal("5", gold) is None
    assert verify.is_equal(None, gold) is None


def test_no_box_is_wrong_if_the_gold_is_usable():
    assert verify.is_equal(None, "5") is False
    assert verify.explain_many([(None, "5")])[0].reason == "no answer"


def test_a_gold_may_be_a_number_or_a_list():
    assert verify.is_equal("5", 5) is True
    assert verify.is_equal("0.5", 0.5) is True
    assert verify.is_equal("six", ["5", "6"]) is True
    assert verify.is_equal("7", ["5", None, "6"]) is False


def test_a_batch_keeps_its_order():
    rows = [row for row in PAIRS if isinstance(row["gold"], str)]
    random.Random(0).shuffle(rows)
    batch = [(row["pred"], row["gold"]) for row in rows[:300]]
    assert verify.verify_many(batch, timeout=60) == [verify.is_equal(*pair) for pair in batch]
    assert verify.verify_many(batch + batch, timeout=60) == verify.verify_many(batch, timeout=60) * 2
    assert verify.verify_many([]) == []


def test_what_a_worker_decided_is_not_asked_again(monkeypatch):
    pairs = [(rf"\lfloor {n}.25 \rfloor", str(n)) for n in range(201, 207)]
    assert verify.verify_many(pairs, timeout=60) == [True] * 6
    monkeypatch.setattr(workers._Worker, "ask", lambda *_: pytest.fail("asked again"))
    assert verify.verify_many(pairs, timeout=60) == [True] * 6


def test_no_more_results_are_kept_than_allowed(monkeypatch):
    monkeypatch.setattr(workers, "MAX_CACHED", 3)
    pairs = [(rf"\lfloor {n}.25 \rfloor", str(n)) for n in range(301, 306)]
    assert verify.verify_many(pairs, timeout=60) == [True] * 5
    assert len(workers.pool.results) == 3


# --------------------------------------------------------------------------- rewards


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("wrap", [str, chat])
def test_an_answer_is_rewarded_by_its_box(wrap):
    completions = [wrap(r"so \boxed{42}"), wrap("so 42"), wrap(r"\boxed{41}"), wrap(r"\boxed{42}")]
    assert verify.answer_reward(["q"] * 4, completions, solution=["42", "42", "42", None], extra=[1] * 4) == [
        1.0,
        0.0,
        0.0,
        None,
    ]


@pytest.mark.parametrize(
    ("pred", "gold", "reward"),
    [
        ("7+5", "12", 0.0),
        ("x=7+5", "12", 0.0),
        (r"7 + 5 \text{ cm}", r"12\text{ cm}", 0.0),
        ("0-5", "-5", 0.0),
        (r"(3+4) \times 2", "14", 0.0),
        ("(3)(4)", "12", 0.0),
        ("7+5", "(B) 12", 0.0),
        ("B. 7+5", "(B) 12", 0.0),
        ("7+5", ["11", "12"], 0.0),
        ("7+5=12", "12", 1.0),
        ("12", "7+5", 1.0),
        ("5+7", "7+5", 1.0),  # what the gold leaves to do
        ("7+5", "(B) 7+5", 1.0),
        (r"8 \times 7", r"(B) 8 \cdot 7", 1.0),
        ("B. y = 2x + 1", "(B) y = 2x + 1", 1.0),
        ("12 cm^2", "(B) 12 cm^2", 1.0),
        ("12", ["7+5", "12"], 1.0),
        (r"2^3 \cdot 5", r"2 \cdot 2 \cdot 2 \cdot 5", 1.0),
        (r"2^2 \cdot 3", r"12 = 2^2 \times 3", 1.0),
        ("(2^{10}-1)/3", r"\frac{2^{10}-1}{3}", 1.0),
        ("1-0.9^5", r"1-\left(\frac{9}{10}\right)^5", 1.0),
        ("3^{1/2}", r"\sqrt{3}", 1.0),
        ("-5", "-5.0", 1.0),
        ("24/2", "12", 1.0),
        ("2^{10}", "1024", 1.0),
        (r"(2.5 \times 10^3)", "2500", 1.0),
        (r"3 \times 10^8", "300000000", 1.0),
        (r"3+2\sqrt{2}", "5.83", 1.0),
        (r"12\pi", "37.70", 1.0),
        ("{" + "(" * 200 + "1+2" + ")" * 200 + "}", "{" + "(" * 200 + "1+2" + ")" * 200 + "}", 1.0),
    ],
)
def test_an_answer_that_leaves_the_sum_to_the_verifier_earns_nothing(pred, gold, reward):
    """Which is still equal: as a policy's answer it would be the question, copied."""
    assert verify.is_equal(pred, gold) is True
    assert verify.answer_reward(["q"], [rf"\boxed{{{pred}}}"], solution=[gold]) == [reward]


def test_unscorable_golds_are_logged_once_with_their_text(caplog):
    gold = r"\boxed{}"
    with caplog.at_level(logging.WARNING, logger="verify"):
        for _ in range(3):
            assert verify.answer_reward(["q", "q"], [r"\boxed{7}", r"\boxed{7}"], solution=["7", gold]) == [1.0, None]
    records = [r.getMessage() for r in caplog.records if repr(gold) in r.getMessage()]
    assert len(records) == 1
    assert "row 1" in records[0]


def test_an_unusable_gold_does_not_pay_for_an_unfinished_sum():
    assert verify.answer_reward(None, ["\\boxed{7+5}"] * 2, ["12", ["12", None]]) == [0.0, 0.0]


def test_a_sum_that_is_one_of_the_golds_is_finished():
    assert verify.answer_reward(None, ["\\boxed{7+5}"], [["12", "7 + 5"]]) == [1.0]


def test_an_answer_that_may_equal_one_gold_is_not_wrong(monkeypatch):
    """The verifier gave up on one of two golds: unscorable, unless the other is equal."""
    gave_up = verify.Result(None, "gave up")
    monkeypatch.setattr(verify.workers.pool, "run", lambda pairs, timeout: [gave_up] * len(pairs))
    found = verify.verify_many([("f(x)", ["3", "g(x)"]), ("f(x)", ["g(x)", "3"]), ("f(x)", ["g(x)", "f(x)"])])
    assert found == [None, None, True]
