"""What a model keeps of the tokens that it has seen while it writes."""

import torch


class Cache:
    """Keys and values of the tokens that a model has seen, so that the next one costs only its own work.

    newest: the embedding of the last of them, (B, 1, C), where a model wants it.
    """

    def __init__(self, n_layer: int) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * n_layer
        self.newest: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """How many tokens that is."""
        return self.layers[0][0].shape[2] if self.layers[0] else 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer with these, (B, H, T, D), added: (B, H, length + T, D)."""
        if kept := self.layers[layer]:
            k, v = torch.cat([kept[0], k], dim=2), torch.cat([kept[1], v], dim=2)
        self.layers[layer] = k, v
        return k, v
