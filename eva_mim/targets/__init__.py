"""Targets of a student for a batch, by name. `live.py`: features of frozen teachers. Places for additions: `cached.py` for stored
features, `normalise.py` for the scales of different teachers."""
