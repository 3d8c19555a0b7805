"""Data sets, prepared copies, augmentation and batches. Only ``pipeline`` needs grain; only ``datasets`` needs TFDS."""
