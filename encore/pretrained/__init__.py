"""Weights on the disk: the folder model/ in Hugging Face's form, and the weights that training can start from.

May import download, tokens and models. Encore runs no code from such a folder and reads no pickle.
"""
