"""The val loss of models of several sizes as a law of their parameters, and what it foretells for larger ones.

    python -m bench.loss_by_size EXPERIMENT ... --predict LAYERSxWIDTH ...

L(N) = E + A / N^alpha: equation 2 of Hoffmann et al. 2022 at one number of tokens, N being the parameters of the
layers, 12 x layers x width^2. The law is fitted twice: without the largest experiment, whose loss it then foretells
as a check, and with all of them.
"""

import argparse
import json
from typing import Any, NamedTuple

import numpy as np

from encore.errors import EncoreError, run_stage
from encore.report.results import read_yaml
from encore.report.revisions import find_revision

EXPONENTS = np.arange(0.02, 2.0, 0.001)


class Law(NamedTuple):
    """L(N) = floor + scale / N^exponent, in nats."""

    floor: float
    scale: float
    exponent: float

    def loss(self, parameters: int) -> float:
        """Nats a token."""
        return self.floor + self.scale * float(parameters) ** -self.exponent


def count_in_layers(n_layer: int, n_embd: int) -> int:
    """Weights of the layers' matrices: attention has 4 of width^2, the MLP 2 of 4 width^2."""
    return 12 * n_layer * n_embd**2


def fit(parameters: list[int], losses: list[float]) -> Law:
    """The law of the least squared error: a line for each exponent, and the best of them. Wants three sizes or more."""
    best = (np.inf, Law(0.0, 0.0, 0.0))
    for exponent in EXPONENTS:
        columns = np.stack([np.ones(len(parameters)), np.array(parameters, float) ** -exponent], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(columns, np.array(losses), rcond=None)
        error = float(np.square(columns @ [floor, scale] - losses).sum())
        if floor >= 0:
            best = min(best, (error, Law(float(floor), float(scale), float(exponent))))
    return best[1]


def load(name: str) -> tuple[int, float]:
    """An experiment's parameters in the layers, and its val loss. Raises EncoreError where it has not ended."""
    revision = find_revision(name)
    metrics = revision.read("metrics/metrics.json")
    if metrics is None:
        raise EncoreError(f"metrics/metrics.json of {name} is missing; `dvc queue status` says whether it has run")
    page = read_yaml(revision, "params.yaml", dict[str, Any])
    return count_in_layers(page["n_layer"], page["n_embd"]), json.loads(metrics)["val"]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.loss_by_size", description=__doc__)
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT")
    parser.add_argument("--predict", nargs="*", default=[], metavar="LAYERSxWIDTH")
    arguments = parser.parse_args()
    if len(arguments.experiments) < 4:
        raise EncoreError(f"{len(arguments.experiments)} experiments will not do; the law has three numbers, give four")
    parameters, losses = (list(column) for column in zip(*sorted(map(load, arguments.experiments)), strict=True))
    for name, law in (("without the largest", fit(parameters[:-1], losses[:-1])), ("all", fit(parameters, losses))):
        print(f"{name}: L(N) = {law.floor:.4f} + {law.scale:.4g} / N^{law.exponent:.3f}")
        for count, loss in zip(parameters, losses, strict=True):
            print(f"  N = {count:,}: {loss:.4f}, the law says {law.loss(count):.4f}")
    for size in arguments.predict:
        count = count_in_layers(*map(int, size.split("x")))
        print(f"{size}, N = {count:,}: {law.loss(count):.4f} foretold")


if __name__ == "__main__":
    run_stage(main)
