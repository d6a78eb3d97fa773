"""One file per architecture. A model is a torch module; none inherits from another."""
