"""The lowest package: every other one may import it. It imports no other package of ours, and no torch."""
