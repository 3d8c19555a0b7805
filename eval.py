"""Score a trained run: python eval.py --run RUNS/NAME [--checkpoint best] [--split DATASET/SPLIT]."""

import sys

from fcn_jax.cli.eval import main
from fcn_jax.cli.process import guarded

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
