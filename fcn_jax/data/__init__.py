"""Data sets, their prepared copies, augmentation and batches.

Nothing is imported here: ``io`` and ``transforms`` need neither tensorflow-datasets, which ``datasets`` imports, nor
grain, which ``pipeline`` does. None of them imports TensorFlow.
"""
