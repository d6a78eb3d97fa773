"""What a model keeps of the tokens that it has seen while it writes."""

import torch


class Cache:
    """Keys and values of at most `size` tokens that a model has seen, so that the next one costs only its own work.

    length: how many it has seen. position: the same as a tensor, (1,), where the passes are recorded once and replayed
    (encore/models/cuda_graph.py); shapes then stay what they are, and a mask hides what is yet to come. newest: the
    embedding of the last token, (B, 1, C), where a model wants it.
    """

    def __init__(self, n_layer: int, size: int) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * n_layer
        self.size, self.length = size, 0
        self.position: torch.Tensor | None = None
        self.newest: torch.Tensor | None = None

    def places(self, tokens: int) -> slice | torch.Tensor:
        """Where the next so many tokens stand in the context: an index."""
        return slice(self.length, self.length + tokens) if self.position is None else self.position

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of a layer with these, (B, H, T, D), added, and which of them the token may look at, None
        where it is all of them."""
        kept = self.layers[layer] or (self._room_for(k), self._room_for(v))
        self.layers[layer] = kept
        if self.position is None:
            end = self.length + k.shape[2]
            for all_of_them, new in zip(kept, (k, v), strict=True):
                all_of_them[:, :, self.length : end] = new
            return kept[0][:, :, :end], kept[1][:, :, :end], None
        places = torch.arange(self.size, device=k.device)
        here = (places == self.position)[:, None]
        for all_of_them, new in zip(kept, (k, v), strict=True):
            all_of_them.copy_(torch.where(here, new, all_of_them))
        return *kept, (places <= self.position)[None]

    def keep_newest(self, x: torch.Tensor) -> None:
        """Keeps the embedding of the last token, (B, 1, C), in the same memory each time."""
        self.newest = x.clone() if self.newest is None else self.newest.copy_(x)

    def advance(self, tokens: int) -> None:
        """After a pass over so many tokens."""
        if self.position is None:
            self.length += tokens
        else:
            self.position += tokens

    def _room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        batch, heads, _, head_size = tensor.shape
        return tensor.new_zeros(batch, heads, self.size, head_size)
