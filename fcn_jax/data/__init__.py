"""Data sets, their prepared copies, augmentation and batches.

``labels`` and ``transforms`` need NumPy, OpenCV and Pillow alone; ``datasets`` imports tensorflow-datasets (which
imports no TensorFlow) and ``pipeline`` imports grain. Nothing is imported here, so that each is paid for by those who
use it.
"""
