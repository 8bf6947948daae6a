"""The signed bundle that carries Homestill to a host without a network. `tool` needs Python's standard library alone."""
