"""Comparing runs: what is to be run, running it, reading what came of it, statistics, and the page."""
