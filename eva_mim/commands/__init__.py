"""Commands of `eva-mim` that are not stages."""
