"""Data sets and losses of each measurement: HH perplexity, and the bias, ethics and truth log-odds losses."""
