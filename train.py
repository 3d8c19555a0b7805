"""Train a network: python train.py [RECIPE] [--field value ...]; `python train.py --help` lists the recipes."""

import sys

from fcn_jax.cli import guarded, keep_compiled, run_train

if __name__ == "__main__":
    keep_compiled()
    sys.exit(guarded(run_train, sys.argv[1:]))
