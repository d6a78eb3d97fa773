"""The hardware: which device and number type, how many processes, and how torchrun starts them.

May import models. The environment decides here, never params.yaml: hardware is no parameter.
"""
