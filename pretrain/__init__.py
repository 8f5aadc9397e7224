"""Programs of the pretraining stages."""
