"""Stages in a row: `plan.py` checks all their settings, `run.py` runs what is not done, `summary.py` tells what they reached."""
