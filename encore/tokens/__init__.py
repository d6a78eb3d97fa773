"""From documents to token shards, and from token shards to the batches of a step.

May import what all share. Used by tokenize and count_tokens to write shards, by train and evaluate to read them.
"""
