"""The lowest room: what every other one may use. It imports nothing of ours, and no torch."""
