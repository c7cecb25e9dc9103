"""`python -m cyclevae.adapters.latentdlm check CHECKPOINT`, in the checkout of the host."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclevae.adapters.latentdlm.files import check_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cyclevae.adapters.latentdlm")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "what a checkpoint has learned, which terms of cycle_vae it supports, what to do first"
    check = commands.add_parser("check", help=about, description=about)
    check.add_argument("checkpoint", type=Path, help="checkpoint.pt of the host, or its folder")
    check.add_argument("--config", type=Path, help="of the run (default: looked for near by)")
    check.add_argument(
        "--data", type=Path, help="holds tokens/ and latents/ (default: the config's own)"
    )
    check.add_argument("--rows", type=int, default=64, help="pairs to read (default: 64)")
    check.add_argument("--seed", type=int, default=0, help="of their choice and of the noise")
    given = parser.parse_args(arguments)
    if given.rows < 2:
        parser.error(f"--rows must be at least 2, got {given.rows}")
    try:
        report = check_checkpoint(
            given.checkpoint, given.config, given.data, rows=given.rows, seed=given.seed
        )
    except (OSError, ImportError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(report + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
