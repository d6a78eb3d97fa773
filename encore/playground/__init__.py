"""A page in the browser to try a model on: `make play`.

May import evaluation and what that may import. Serves this machine only.
"""
