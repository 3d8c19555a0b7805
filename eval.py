"""Score a trained run: python eval.py --run RUNS/NAME [--checkpoint best] [--split DATASET/SPLIT]."""

import sys

from fcn_jax.cli import run_eval
from fcn_jax.cli.process import guarded, keep_compiled

if __name__ == "__main__":
    keep_compiled()
    sys.exit(guarded(run_eval, sys.argv[1:]))
