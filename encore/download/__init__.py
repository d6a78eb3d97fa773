"""Brings text, published weights and the tokenizer's ranks here: from the Hub, from local files, from a package.

May import what all share. The download stage uses it; nothing else touches the network.
"""
