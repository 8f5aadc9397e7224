"""Data sets: folders, shards, lists and drawn scenes, and the indices that list them."""
