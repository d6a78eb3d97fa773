"""Loss and every gradient, compiled and as the code is written, against float64."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.gpu.pages import TINY, TINY_VOCAB_SIZE, Page, gpt2, nanochat, nanochat_plus, print_head, print_row
from bench.train import VOCAB_SIZE
from encore.devices.device import autocast, find_device, naming_what_does_not_repeat, set_up_numerics
from encore.models.architectures import Model, make_config, make_model
from encore.params import StageParams
from encore.training.compiled_check import LARGEST_ERROR

PAGES: dict[str, Callable[..., Page]] = {
    "gpt2": gpt2,
    "nanochat": nanochat,
    "nanochat-plus": nanochat_plus,
    "gpt2, documents masked": partial(gpt2, document_masking=True),
    "nanochat-plus, documents masked": partial(nanochat_plus, document_masking=True),
}
DOCUMENTS = 3  # in a sequence
SEQUENCES = 4
NOISE = 0.02  # zeros let no gradient through
Values = dict[str, torch.Tensor]


def run(folder: Path, tiny: bool, nanogpt: Path | None) -> None:
    """Two layers of each architecture at GPT-2's width and context. A tensor's error is a share of its norm."""
    device = find_device()
    set_up_numerics(device)
    print_head("architecture", "dtype", "as", "error of the loss", "largest error of a gradient", "where", "")
    wrong = 0
    for name, make_page in PAGES.items():
        page = make_page(tiny, n_layer=2) | ({**TINY, "n_layer": 1} if tiny else {})
        vocab_size = TINY_VOCAB_SIZE if tiny else VOCAB_SIZE
        torch.manual_seed(0)
        model = make_model(make_config(StageParams("train", page), vocab_size)).to(device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE * torch.randn_like(parameter))
        batch = torch.randint(vocab_size, (SEQUENCES, page["block_size"] + 1), device=device)
        batch[:, 1 :: page["block_size"] // DOCUMENTS] = vocab_size - 1  # end-of-text
        exact = copy.deepcopy(model).double()
        right = compute(exact, exact, batch, torch.float32)
        del exact
        for dtype in (torch.float32, torch.bfloat16):
            # The whole compiler takes a minute for these on two cores; --tiny goes as far as its traces.
            compiled = torch.compile(model, backend="aot_eager" if tiny else "inductor", fullgraph=True)
            for how, forward in (("written", model), ("compiled", compiled)):
                loss, worst, where = compare(compute(forward, model, batch, dtype), right)
                good = max(loss, worst) <= LARGEST_ERROR[dtype]
                wrong += not good
                verdict = "" if good else "WRONG"
                print_row(name, str(dtype)[6:], how, f"{loss:.1e}", f"{worst:.1e}", where, verdict)
        torch.compiler.reset()
    if wrong:
        raise SystemExit(f"bench: {wrong} of these are wrong")


def compute(forward: Callable[..., torch.Tensor], model: Model, batch: torch.Tensor, dtype: torch.dtype) -> Values:
    """The loss and every gradient, in the precision that they come in."""
    model.zero_grad()
    parameters = dict(model.named_parameters())
    with autocast(batch.device, dtype), naming_what_does_not_repeat():
        loss = forward(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss.detach(), **dict(zip(parameters, gradients, strict=True))}


def compare(actual: Values, right: Values) -> tuple[float, float, str]:
    """The relative error of the loss, the largest of a gradient, and whose that is."""
    errors = {name: ((actual[name].double() - value).norm() / value.norm()).item() for name, value in right.items()}
    loss = errors.pop("loss")
    where = max(errors, key=lambda name: errors[name])
    return loss, errors[where], where
