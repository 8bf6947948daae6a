"""Makes the small base model of the demo; `scripts/make_base` is the command."""
