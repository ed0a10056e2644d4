"""What report.py is made of.

runs.py          what training runs left behind
curves.py        what is drawn of them, and of results
hostile.py       text and images that a model wrote, made harmless to look at
page.html.jinja  the page
"""
