"""What the export stage does: convert, quantise, check."""
