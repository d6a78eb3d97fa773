"""AdamW with the two groups of GPT training, where matrices and embeddings decay, biases and norms do not; and Muon for
the matrices of the layers, beside AdamW for the rest.

Each group's highest learning rate is its `initial_lr`, torch's name for what a schedule scales.
"""

import torch
from torch import nn

from encore.models.architectures import Model
from encore.params import StageParams
from encore.training.muon import Muon


def make_optimizers(model: Model, params: StageParams) -> list[torch.optim.Optimizer]:
    """What `optimizer` in params.yaml names. They share the parameters out among them and step together."""
    betas = (params.beta1, params.beta2)
    if params.optimizer == "muon":
        rates = {"embedding_lr": params.embedding_lr, "head_lr": params.head_lr or params.embedding_lr}
        return make_muon(model, params.learning_rate, **rates, betas=betas, weight_decay=params.weight_decay)
    return [make_adamw(model, params.learning_rate, betas, params.weight_decay)]


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
    groups = [{**group, "initial_lr": learning_rate} for group in decay_groups(model, weight_decay)]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def make_muon(
    model: Model,
    learning_rate: float,
    embedding_lr: float,
    head_lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, which alone decay; AdamW without decay for the rest, at
    `head_lr` for an output matrix of its own, at `embedding_lr` for embeddings, biases and norms.

    Muon's step has about the size of the learning rate along every direction of a matrix, whatever its gradient.
    """
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
    head = [parameter for name, parameter in model.named_parameters() if name == "lm_head.weight"]
    others = {id(parameter) for parameter in [*matrices, *head]}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in others]
    groups = [
        {"params": parameters, "lr": rate, "initial_lr": rate}
        for parameters, rate in ((rest, embedding_lr), (head, head_lr))
        if parameters
    ]
    muon = Muon([{"params": matrices, "initial_lr": learning_rate}], learning_rate, weight_decay)
    return [muon, torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True)]


def describe_groups(optimizers: list[torch.optim.Optimizer]) -> str:
    """One line that would show a wrong split at once."""
    return ", ".join(
        f"{len(group['params'])} tensor{'s'[: len(group['params']) - 1]} "
        f"({sum(p.numel() for p in group['params']):,} numbers) "
        f"by {type(optimizer).__name__} at {group['initial_lr']} with weight decay {group['weight_decay']}"
        for optimizer in optimizers
        for group in optimizer.param_groups
    )
