"""What a run left behind, for people: the report, the summary at the end of `make repro`, DVC's plots page.

May import pipeline and what all share: it reads files that stages have written and computes nothing anew.
"""
