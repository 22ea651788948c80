"""Layer 4: blending, submission files and the score log."""
