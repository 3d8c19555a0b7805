"""Scores over a split, class maps of single images, and their pictures."""
