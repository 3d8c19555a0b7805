"""Score a trained run: python eval.py --run RUNS/NAME [--checkpoint best] [--split DATASET/SPLIT]."""

import sys

from fcn_jax.cli import guarded, run_eval

if __name__ == "__main__":
    sys.exit(guarded(run_eval, sys.argv[1:]))
