"""Fixtures of the integration tests."""
