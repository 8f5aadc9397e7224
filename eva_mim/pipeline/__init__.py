"""Stages in a row."""
