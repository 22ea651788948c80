"""Layer 3: wrapping, precision, optimizer step, schedules, freezing, EMA, pretrained weights, metrics, state."""
