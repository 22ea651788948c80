"""Layer 5: blending, submission files and the score log."""
