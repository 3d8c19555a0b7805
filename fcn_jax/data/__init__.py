"""Data sets, their prepared copies, augmentation and batches. Only ``pipeline`` needs grain, only ``datasets`` TFDS."""
