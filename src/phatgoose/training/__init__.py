"""Adapters and gates, trained."""
