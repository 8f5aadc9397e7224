"""Programs of the classification stages."""
