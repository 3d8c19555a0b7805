"""The run around the training step: config checks, devices, processes, loop, log, checkpoints."""
