"""Train a bidirectional denoiser on names and pictures of emoji, with and without cycles.

Few names have their picture beside them. Three runs differ in nothing but what they do with the
names and pictures that lack a partner: `base` leaves them alone, `control` denoises them one by one
in the unconditional mode, and `cycle` runs both cycles on them. Then each draws held-out names and
reads held-out pictures, in one image. Run it with `make demo ARGS=--pictures`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "sentences"))

try:
    import torch
    from data import MASK, PAD, UNK, DemoError
    from emoji_data import Pictures, load_pictures, regime
    from evaluate import evaluate
    from figure import draw
    from model import JointTransformer
    from report import ROWS as TABLE
    from report import table
    from safetensors.torch import save_model
    from torch import Tensor
    from train import Config, train

    import cyclevae as cv
except ImportError as error:
    sys.exit(f'error: a package is missing ({error}): run "make demo ARGS=--pictures"')

HERE = Path(__file__).resolve().parent
DIM = 64  # of a latent
SHOWN = 10  # held-out names, and as many pictures
SAMPLES, FEW = 32, 2  # readings of which the best is kept; of a quick run


def main() -> int:
    options = _options()
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nstopped; runs that were finished lie in", options.output)
        return 130
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(
            f"error: cannot write {error.filename or options.output}: {error.strerror}; "
            "free some space, or choose another folder with --output and --cache",
            file=sys.stderr,
        )
    return 1


def run(options: argparse.Namespace) -> int:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(options.threads)
    out: Path = options.output
    out.mkdir(parents=True, exist_ok=True)
    log = out / "metrics.jsonl"
    log.write_text("")
    data = load_pictures(options.cache, dim=DIM, seed=options.seed, by=options.split)
    split = regime(data, options.pairs, options.seed)
    text_process = cv.TextProcess(
        mask_id=MASK, vocab_size=len(data.vocabulary), pad_id=PAD, special_ids=(UNK,)
    )
    latent_process = cv.LatentProcess("cosine", prediction="x0", shape=(DIM,))
    print(
        f"{len(split.paired):,} emoji with name and picture, {len(split.unpaired_text):,} names "
        f"and {len(split.unpaired_latent):,} pictures without partner; {len(data.validation)} to "
        f"choose checkpoints, {len(data.test)} to test; {len(data.vocabulary):,} words"
    )
    denoisers, summary = {}, {}
    for name, terms in rows(options.steps).items():
        objective = cv.CycleObjective(text_process, latent_process, terms)
        torch.manual_seed(options.seed)
        network = JointTransformer(len(data.vocabulary), DIM, length=data.train.tokens.shape[1])
        config = Config(
            steps=options.steps, seed=options.seed, evaluate_every=max(4, options.steps // 15)
        )
        began = time.perf_counter()
        trained = train(
            name, network, objective, data, split, config, unpaired=name != "base", log=log
        )
        if trained.interrupted:
            raise KeyboardInterrupt
        if not trained.weights:
            raise DemoError(f"run {name!r} diverged: every validation score is NaN")
        network.load_state_dict(trained.weights)
        save_model(network, out / f"{name}.safetensors")
        denoisers[name] = denoiser = cv.as_denoiser(network.eval())
        summary[name] = evaluate(denoiser, data.test, text_process, latent_process)
        summary[name] |= {"best_step": trained.best_step}
        print(f"{name:>7}: best at step {trained.best_step}, {time.perf_counter() - began:.0f} s")
    read, samples = {}, FEW if options.quick else SAMPLES
    for name, denoiser in denoisers.items():
        once, best = readings(denoiser, data, objective, samples)
        read |= {name: once, f"{name}, best of {samples}": best}
        summary[name] |= {"exact": exactly(once, data), "exact_best": exactly(best, data)}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    more = {
        "exact": ("names read exactly", "high", ".3f"),
        "exact_best": (f"the same, best of {samples} readings", "high", ".3f"),
    }
    print("\n" + table(summary, pool=len(data.test), rows=TABLE | more))
    draw(out / "pictures.png", denoisers, read, data, objective, shown=SHOWN)
    print(f"\nresults: {out / 'pictures.png'}, {out / 'summary.json'}; checkpoints lie beside them")
    return 0


def rows(steps: int) -> dict[str, list[cv.Term]]:
    """The terms of each run; cycles wait until the pairs have taught something."""
    base: list[cv.Term] = [cv.Text(), cv.Latent()]
    later = cv.ramp(1.0, steps // 4, steps // 4)
    return {
        "base": base,
        "control": [*base, cv.Unconditional()],
        "cycle": [
            *base,
            cv.CycleText(weight=cv.ramp(4.0, steps // 4, steps // 4)),
            cv.CycleLatent(weight=later),
        ],
    }


@torch.inference_mode()
def readings(
    denoiser: cv.Denoiser, data: Pictures, objective: cv.CycleObjective, samples: int
) -> tuple[Tensor, Tensor]:
    """The names of test pictures, one reading each, and the best of several by the model itself.

    Their lengths are given.
    """
    z, mask = data.test.latents, data.test.attention_mask
    given = {"text_process": objective.text_process}
    once = cv.decode(denoiser, z, mask, **given)
    best = cv.best_text(
        denoiser, z, mask, latent_process=objective.latent_process, samples=samples,
        generator=torch.Generator().manual_seed(0), **given,
    )  # fmt: skip
    return once, best.tokens


def exactly(tokens: Tensor, data: Pictures) -> float:
    """The share of test names that are read without a mistake."""
    right = (tokens == data.test.tokens) | ~data.test.attention_mask
    return right.all(dim=1).float().mean().item()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument(
        "--split", choices=("name", "family"), default="name",
        help="what is held out: single emoji, or with them all of their skin tones, which is hard",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each run (default 1000; quick: 30)")
    parser.add_argument("--output", type=Path, default=Path("runs/pictures"))
    parser.add_argument(
        "--threads", type=int, default=1, help="sums in another order differ in their last digits"
    )
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".cache" / "pictures")
    options = parser.parse_args()
    options.steps = options.steps or (30 if options.quick else 1000)
    if options.steps < 4:
        parser.error(f"--steps must be at least 4, got {options.steps}")
    return options


if __name__ == "__main__":
    sys.exit(main())
