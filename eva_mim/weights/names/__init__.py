"""Naming schemes of checkpoints: each to ours and back."""
