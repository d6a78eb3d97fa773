"""The DVC pipeline as a whole: its history on this machine, copies for experiments, repair, and verification.

May import pretrained, tokens and download. The library does not import dvc.
"""
