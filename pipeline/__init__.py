"""Prune a checkpoint on one machine: methods, streaming, transactions. Imports no Ray."""
