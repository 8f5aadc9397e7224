"""Pipelines of stages: `plan.py` checks all their settings, `run.py` runs the unfinished ones, `summary.py` writes their
figures."""
