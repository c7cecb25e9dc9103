"""What `make demo` runs: real sentences, or with `--pictures` names and pictures of emoji."""

import runpy
import sys
from pathlib import Path

kind = "sentences"
if "--pictures" in sys.argv:
    sys.argv.remove("--pictures")
    kind = "pictures"
folder = Path(__file__).resolve().parent / kind
sys.path.insert(0, str(folder))
runpy.run_path(str(folder / "demo.py"), run_name="__main__")
