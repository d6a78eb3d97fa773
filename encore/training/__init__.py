"""The training loop and what belongs to it: optimizers, schedule, checkpoints, curves.

May import evaluation, devices, pretrained, models and tokens.
"""
