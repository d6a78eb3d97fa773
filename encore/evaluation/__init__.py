"""What a model is worth: its loss on a split, standard tasks, and the text that it writes.

May import devices, pretrained, models and tokens. Draws nothing from training's randomness.
"""
