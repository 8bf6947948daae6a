"""Studies of a task: what prompts, weights, demonstrations and instructions each contribute, and what was forgotten."""
