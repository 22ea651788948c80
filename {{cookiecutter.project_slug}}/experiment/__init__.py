"""Yours: what is learned, and from what."""
