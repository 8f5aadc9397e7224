"""The words of the project: errors, contracts, settings, and helpers without any other file of ours. No torch at import."""
