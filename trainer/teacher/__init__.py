"""The teacher: its client, its prices, what it will cost, and its prompts' optimisation."""
