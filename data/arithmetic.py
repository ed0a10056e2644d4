"""One-digit arithmetic without images, for a small language model: sums and products of 0 to 9.

python train_spark.py --config recipes/smollm2_135m.yaml --dataset arithmetic

>>> arithmetic_rows()[0]
{'prompt': 'What is 0+0?', 'solution': '0'}
"""

import operator

QUESTIONS = {
    "{a}+{b}": ("What is {x}?", "Add {a} and {b}. What is the total?"),
    "{a}*{b}": ("What is {x}?", "Multiply {a} by {b}. What is the product?"),
}
OPERATORS = {"{a}+{b}": operator.add, "{a}*{b}": operator.mul}


def arithmetic_rows() -> list[dict[str, str]]:
    """Every question there is: 2 operations x 100 pairs of digits x 2 wordings."""
    return [
        {"prompt": wording.format(x=term.format(a=a, b=b), a=a, b=b), "solution": str(OPERATORS[term](a, b))}
        for term, wordings in QUESTIONS.items()
        for wording in wordings
        for a in range(10)
        for b in range(10)
    ]
