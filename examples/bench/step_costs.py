"""What a step of LLaDA-8B's and of SD3-medium's dimensions costs, told on the meta device.

`python examples/bench/step_costs.py` prints the tables of docs/step-cost.md, in a minute, on any
machine and without a GPU: two pairs, weights in bf16.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from large import SD3, LLaDA
from torch import nn

import cyclevae as cv
from cyclevae.diagnostics import StepCost, step_cost

ROWS = 2
BASE = [cv.Text(time=1.0), cv.Latent()]
RECIPE = [*BASE, cv.CycleText(pairs=True)]
VARIANTS: dict[str, tuple[list[cv.Term], Callable[[cv.Denoiser], cv.Denoiser]]] = {
    "both directions, no cycle": (BASE, lambda denoiser: denoiser),
    "the recipe": (RECIPE, lambda denoiser: denoiser),
    "with `fraction=0.5`": (
        [*BASE, cv.CycleText(pairs=True, fraction=0.5)],
        lambda denoiser: denoiser,
    ),
    "with `checkpoint_passes`": (RECIPE, cv.checkpoint_passes),
    "and `CycleLatent`": ([*RECIPE, cv.CycleLatent(pairs=True)], lambda denoiser: denoiser),
}


def llada(length: int) -> tuple[nn.Module, cv.Batch, tuple[cv.TextProcess, cv.LatentProcess]]:
    network, tokens = LLaDA(), torch.zeros(ROWS, length, dtype=torch.long)
    batch = cv.Batch(tokens, torch.ones_like(tokens), torch.zeros(ROWS, 1024))
    return network, batch, (cv.TextProcess(2, 126_464), cv.LatentProcess())


def sd3(length: int) -> tuple[nn.Module, cv.Batch, tuple[cv.TextProcess, cv.LatentProcess]]:
    network, tokens = SD3(), torch.zeros(ROWS, length, dtype=torch.long)
    batch = cv.Batch(tokens, torch.ones_like(tokens), torch.zeros(ROWS, 16, 128, 128))
    flow = cv.LatentProcess("flow", prediction="velocity")
    return network, batch, (cv.TextProcess(2, 32_128), flow)


CASES = {
    "LLaDA-8B, 1,024 tokens": partial(llada, 1024),
    "LLaDA-8B, 4,096 tokens": partial(llada, 4096),
    "SD3-medium, latents [16, 128, 128], captions of 256 tokens": partial(sd3, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the recipe of the smallest alone")
    quick = parser.parse_args().quick
    for name, make in list(CASES.items())[-1:] if quick else CASES.items():
        with torch.device("meta"):
            network, batch, processes = make()
        numbers = sum(p.numel() for p in network.parameters())
        print(f"\n### {name}, {numbers / 1e9:.2f} billion parameters\n")
        print("| | passes | TFLOP | of one L2T step | live GiB | of one L2T step |")
        print("|---|---:|---:|---:|---:|---:|")
        for number, (variant, (terms, wrap)) in enumerate(VARIANTS.items()):
            if quick and variant != "the recipe":
                continue
            print(f"telling {name}, {variant} ...", file=sys.stderr)
            objective = cv.CycleObjective(*processes, terms)
            module = cv.StepModule(wrap(cv.as_denoiser(network)), objective)
            cost = step_cost(module, batch, dtype=torch.bfloat16)
            if not number or quick:
                one = alone(cost)
                print(row("one L2T step", one, one))
            print(row(variant, cost, one))
            if variant == "the recipe":
                recipe = cost
        print(f"\n```text\n{recipe}\n```")


def alone(cost: StepCost) -> StepCost:
    if cost.l2t is None:
        raise ValueError("a batch of pairs has an L2T step")
    return cost.l2t


def row(name: str, cost: StepCost, one: StepCost) -> str:
    flops = f"{cost.flops / 1e12:.0f} | {cost.flops / one.flops:.2f}"
    return (
        f"| {name} | {len(cost.passes)} | {flops} | {cost.live / 2**30:.1f} | "
        f"{cost.live / one.live:.2f} |"
    )


if __name__ == "__main__":
    main()
