"""Layouts that need more than columns by their names, one file each; data/read.py knows the rest.

NAME                  what its rows are called
COLUMNS               its columns of the question and of the answer
matches(columns, head)    whether the first records are of this layout
record(raw) -> Record     raises RowError
"""
