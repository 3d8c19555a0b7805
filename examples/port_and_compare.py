"""Take a PyTorch FCN's weights over and compare the logits; needs torch: python examples/port_and_compare.py.

The PyTorch network here is the twin of an FCN-8s; with your own, save its state dict and give its file or a dict.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

import fcn_jax
from fcn_jax.compare import make_twin


def main():
    """Port a randomly initialised PyTorch network; return the largest difference of the logits."""
    torch.manual_seed(0)
    model = fcn_jax.create_model("fcn8s", num_classes=5, encoder="vgg11", width=0.125)
    theirs = make_twin(model).eval()  # any torch.nn.Module with a known layout
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    print("layout:", fcn_jax.weights.inspect(arrays).layout)
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    variables = fcn_jax.weights.load(arrays, model, variables)  # every tensor is used, none is missing

    images = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    ours = jax.jit(model.apply)(variables, jnp.asarray(images))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    difference = float(np.abs(ours - expected).max() / np.abs(expected).max())
    print(f"largest difference of the logits: {difference:.1e} of the largest logit")
    return difference


if __name__ == "__main__":
    main()
