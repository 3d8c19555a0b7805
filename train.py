"""Train a network: python train.py [RECIPE] [--field value ...]; `python train.py --help` lists the recipes."""

import sys

from fcn_jax.cli import run_train
from fcn_jax.cli.process import guarded, keep_compiled

if __name__ == "__main__":
    keep_compiled()
    sys.exit(guarded(run_train, sys.argv[1:]))
