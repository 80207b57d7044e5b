"""The command line: the only place that prints, and the only one that sees both adapters (imported lazily)."""
