"""Train a network: python train.py [RECIPE] [--field value ...]; `python train.py --help` lists the recipes."""

import sys

from fcn_jax.cli import guarded, run_train

if __name__ == "__main__":
    sys.exit(guarded(run_train, sys.argv[1:]))
