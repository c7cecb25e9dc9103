"""Run every recipe on the same data, and write what each reached into docs/recipes/index.md."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "recipes" / "index.md"
PYTHON = [sys.executable]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RECIPES: dict[str, tuple[list[str], str]] = {
    "plain": (PYTHON, "PyTorch, seed 0"),
    "plain 1": (PYTHON, "PyTorch, seed 1"),
    "plain 2": (PYTHON, "PyTorch, seed 2"),
    "ddp": (TWO_RANKS, "DDP, 2 ranks, 2 accumulation steps"),
    "fsdp2": (TWO_RANKS, "FSDP2, 2 ranks"),
    "lightning_module": (PYTHON, "Lightning"),
    "hf_trainer": (PYTHON, "Hugging Face `Trainer`, 2 accumulation steps"),
    "accelerated": (TWO_RANKS, "accelerate, 2 ranks, 2 accumulation steps"),
    "hydra_config": (PYTHON, "Hydra"),
    "trackers": (PYTHON, "TensorBoard and W&B"),
    "two_networks": (PYTHON, "two networks"),
    "masked_lm": (PYTHON, "a Hugging Face BERT"),
    "diffusers_transformer": (PYTHON, "a `diffusers` transformer, flow matching"),
}


def start(recipe: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A recipe in a process of its own, on one thread, so that its sums have one order."""
    launcher, _ = RECIPES[recipe]
    name, *seed = recipe.split()
    return subprocess.Popen(
        [*launcher, str(HERE / f"{name}.py"), *seed, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", **options.pop("env", {})},
        **options,
    )


def result_of(process: subprocess.Popen[str]) -> dict[str, float]:
    """What the line of JSON says; an error with the end of its messages where it failed."""
    output, messages = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} failed:\n{messages[-3000:]}")
    (line,) = [line for line in output.splitlines() if line.startswith('{"recipe"')]
    return {name: x for name, x in json.loads(line).items() if name != "recipe"}


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| loop | L2T CE ↓ | T2L MSE ↓ | R@10 ↑ |", "|---|---:|---:|---:|"]
    for recipe, found in results.items():
        numbers = f"{found['l2t_ce']:.3f} | {found['t2l_mse']:.3f} | {found['t2l_r10']:.3f}"
        lines.append(f"| {RECIPES[recipe][1]} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    results = {recipe: result_of(start(recipe)) for recipe in tqdm(RECIPES, "recipes")}
    print(table(results))
    before, _, rest = PAGE.read_text().partition("<!-- table -->")
    _, _, after = rest.partition("<!-- /table -->")
    PAGE.write_text(f"{before}<!-- table -->\n\n{table(results)}\n\n<!-- /table -->{after}")


if __name__ == "__main__":
    main()
