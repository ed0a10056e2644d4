"""Layouts that need more than columns by their names, one file each; data/read.py knows the rest.

NAME                  what its rows are called
COLUMNS               its columns of the question and of the answer
matches(columns, head)    whether the first records are of this layout
record(raw) -> Record     raises RowError; images, options and budgets that it leaves out come from the usual columns

None of them is asked where the data have `prompt` and `solution`.
"""

from data.formats import (
    gpqa,
    gsm8k,
    judgebench,
    llava,
    math_boxed,
    messages,
    processbench,
    spark_data,
    verl,
    vl_rewardbench,
    vlmevalkit,
)

JUDGED = (vl_rewardbench, judgebench, processbench)  # their rows are for a judge alone
GOLD_ALONE = (gsm8k, math_boxed)  # only say where in its column a gold is
# The first that matches is taken.
FORMATS = (spark_data, llava, messages, verl, *JUDGED, vlmevalkit, gpqa, gsm8k, math_boxed)
