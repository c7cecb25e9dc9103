"""Train a bidirectional text/latent denoiser on real sentences, with and without the cycle.

Three runs that differ in nothing but what they do with texts and latents that have no partner:
`base` leaves them alone, `control` denoises them one by one in the unconditional mode, and `cycle`
teaches the decoder such texts from the latents that the encoder writes. Run it with `make demo`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: kind to shared cores

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

try:
    import torch
    from data import INSTALL, MASK, PAD, UNK, DemoError, Sentences, load_sentences, regime
    from evaluate import evaluate
    from report import plot, sentences_table, table
    from safetensors.torch import save_model
    from torch import nn
    from train import Config, Run, train

    import cyclevae as cv
except ImportError as error:
    sys.exit(f'error: the demo misses a package ({error}): run "make demo", which installs it')

HERE = Path(__file__).resolve().parent


def main() -> int:
    options = _options()
    try:
        return run(options)
    except KeyboardInterrupt:
        kept = options.output / "summary.json"
        print(
            f"\nstopped; {f'what was finished is in {kept}' if kept.exists() else 'no result yet'}"
        )
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
    for stale in (*out.glob("*.safetensors"), out / "summary.json", out / "curves.png"):
        stale.unlink(missing_ok=True)  # an old checkpoint must not lie beside a new normaliser
    log = out / "metrics.jsonl"
    log.write_text("")
    every = max(4, options.steps // 15)
    config = Config(seed=options.seed, steps=options.steps, evaluate_every=every)
    data = load_sentences(
        options.cache, dim=64, seed=options.seed, limit=2000 if options.quick else None
    )
    split = regime(data.train, 300 if options.quick else 1000, options.seed)
    text_process = cv.TextProcess(
        mask_id=MASK, vocab_size=len(data.vocabulary), pad_id=PAD, special_ids=(UNK,)
    )
    latent_process = cv.LatentProcess("cosine", prediction="v", shape=(64,))
    warmup = options.steps // 4  # first the pairs, until the directions know something to teach
    base = [cv.Text(), cv.Latent()]
    terms = {
        "base": base,
        "control": [*base, cv.Unconditional()],
        "cycle": [*base, cv.CycleText(weight=cv.ramp(4.0, warmup, warmup))],
    }
    objectives = {
        name: cv.CycleObjective(text_process, latent_process, each) for name, each in terms.items()
    }
    print(
        f"{len(data.train):,} training sentences: {len(split.paired):,} pairs, "
        f"{len(split.unpaired_text):,} texts and {len(split.unpaired_latent):,} latents without "
        f"partner; {len(data.validation)} to choose checkpoints, {len(data.test)} to test; "
        f"{len(data.vocabulary):,} word pieces"
    )
    _save_contract(out, data, config, options, objectives["cycle"])

    denoisers: dict[str, cv.Denoiser] = {}
    summary: dict[str, dict[str, float]] = {}
    finished: dict[str, Run] = {}
    for name, objective in objectives.items():
        torch.manual_seed(options.seed)
        network = _network(options.model, data)
        began = time.perf_counter()
        result = train(
            name, network, objective, data, split, config, unpaired=name != "base", log=log,
        )  # fmt: skip
        if result.weights:
            network.load_state_dict(result.weights)
            save_model(network, out / f"{name}.safetensors")
            denoisers[name], finished[name] = cv.as_denoiser(network.eval()), result
            summary[name] = evaluate(denoisers[name], data.test, text_process, latent_process)
            summary[name] |= {"best_step": result.best_step}
            _write(out / "summary.json", json.dumps(summary, indent=2))
        if result.interrupted:
            break
        if not result.weights:
            raise DemoError(
                f"run {name!r} diverged: every validation score is NaN; lower the learning rate"
            )
        print(f"{name:>7}: best at step {result.best_step}, {time.perf_counter() - began:.0f} s")
    if not finished:
        raise KeyboardInterrupt
    interrupted = len(finished) < len(objectives) or result.interrupted
    print("\n" + table(summary, pool=len(data.test)))
    print("\n" + sentences_table(denoisers, data, text_process))
    plot(finished, out / "curves.png")
    if interrupted:
        print("\ninterrupted: the results above are those of the steps that ran")
    print(
        f"\nresults: {out / 'summary.json'}, {out / 'metrics.jsonl'}, {out / 'curves.png'}; "
        f"checkpoints, vocabulary and latent normaliser lie beside them"
    )
    return 130 if interrupted else 0


def _network(kind: str, data: Sentences) -> nn.Module:
    length = data.train.tokens.shape[1]
    if kind == "joint":
        from model import JointTransformer

        return JointTransformer(len(data.vocabulary), 64, length=length)
    try:
        from mmdit_model import MMDiTDenoiser
    except ImportError as error:
        raise DemoError(f"--model mmdit needs the package mmdit, got {error}: {INSTALL}") from error
    return MMDiTDenoiser(len(data.vocabulary), 64, length=length)


def _save_contract(
    out: Path,
    data: Sentences,
    config: Config,
    options: argparse.Namespace,
    objective: cv.CycleObjective,
) -> None:
    """What a checkpoint needs to be used: ids, latent statistics (`normaliser.undo`), settings."""
    data.normaliser.save(out / "normaliser.safetensors")
    _write(out / "vocabulary.json", json.dumps(list(data.vocabulary.pieces)))
    settings = {
        "model": options.model,
        "length": data.train.tokens.shape[1],
        "quick": options.quick,
        "training": asdict(config),
        "objective": objective.to_config(),
    }
    _write(out / "config.json", json.dumps(settings, indent=2))


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("joint", "mmdit"), default="joint")
    parser.add_argument("--quick", action="store_true", help="a small part of the data, 90 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each run (default 600; quick: 45)")
    parser.add_argument("--output", type=Path, help="default runs/demo (quick: runs/quick)")
    parser.add_argument(
        "--threads", type=int, default=2, help="sums in another order differ in their last digits"
    )
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".cache" / "sentences")
    options = parser.parse_args()
    options.output = options.output or Path("runs/quick" if options.quick else "runs/demo")
    if options.steps is None:
        options.steps = 45 if options.quick else 600
    if options.steps < 4:
        parser.error(
            f"--steps must be at least 4, a quarter of which warms up, got {options.steps}"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
