"""Train a network: python train.py [RECIPE] [--field value ...]; `python train.py --help` lists the recipes."""

import sys

from fcn_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
