"""Train a network: python train.py [RECIPE] [--field value ...]; `python train.py --help` lists the recipes."""

import sys

from fcn_jax.cli.process import guarded
from fcn_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
