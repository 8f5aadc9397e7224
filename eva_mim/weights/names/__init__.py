"""Naming schemes of checkpoints, each translated to ours and back."""
