"""One file per architecture, and the parts that they share. A model is a torch module; none inherits from another.

May import what all share; knows nothing of files, devices or training.
"""
