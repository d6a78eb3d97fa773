"""Brings text, published weights and the tokenizer's ranks here: from the Hub, from local files, from a package.

May import what all share. The download stages use it; no other stage touches the network.
"""
