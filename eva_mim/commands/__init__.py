"""Everything behind `eva-mim NAME` that is no stage."""
