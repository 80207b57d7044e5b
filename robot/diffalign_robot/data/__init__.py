"""Data sets of recorded episodes in the formats of others: one file a format, chosen by what a path is."""
