"""The arithmetic of evaluation and certification: no files, no models."""
