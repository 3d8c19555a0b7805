"""Scores of a split, class maps of single images, and figures."""
