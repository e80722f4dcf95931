"""Runs: what every tool that runs a model many times shares: cells, the run they edit, the engine, the ledger."""
