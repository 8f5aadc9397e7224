"""Targets of a student for a batch, by name. `live.py`: features of frozen teachers. `cached.py`: features from a store
(`data/store`). A place for additions: `normalise.py` for the scales of different teachers."""
