"""What evaluate.py is made of.

settings.py   what decides a result, and what an engine needs
solvers.py    the modes, and the ways of test-time scaling: a row in, requests out, a result back
server.py     OpenAI-compatible servers, as an engine
"""
