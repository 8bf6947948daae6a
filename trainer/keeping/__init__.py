"""Life after day one: backup, restore, upgrade, pruning, and traces carried between hosts."""
