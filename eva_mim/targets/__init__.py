"""What a student learns to predict of a batch, by name. `live.py`: features of frozen teachers. Features that were computed once
and stored belong into `cached.py`, the scales of different teachers into `normalise.py`."""
