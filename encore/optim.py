"""AdamW with the two groups of GPT training: matrices and embeddings decay, biases and norms do not."""

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: parameters of two or more dimensions with `weight_decay`, the others with none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) in torch's fused form, which does each step in one pass over the memory."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """One line that would show a wrong split at once."""
    return ", ".join(
        f"{len(group['params'])} tensors ({sum(p.numel() for p in group['params']):,} numbers) "
        f"at weight decay {group['weight_decay']}"
        for group in optimizer.param_groups
    )
