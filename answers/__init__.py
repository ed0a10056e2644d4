"""How verify.py decides whether two answers are the same.

rules.py        which answers are equal: choices, lists, relations, units, numbers; start here
structure.py    what an answer is made of: list, set, interval, equation, matrix, ...
units.py        numbers with units: 5 cm, 12 percent, $1,250, twelve
normalize.py    one spelling for what is written in several ways
calculator.py   the value of an expression, exact or to 60 digits
workers.py      math-verify, in processes that are killed when they overrun
"""
