"""The second stage: train students from a cache."""
