"""Score a trained run: python eval.py --run RUNS/NAME [--checkpoint best] [--split DATASET/SPLIT]."""

import sys

from fcn_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
