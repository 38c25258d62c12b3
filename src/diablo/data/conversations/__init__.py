"""Conversations as chat templates read and write them, and what their messages hold."""
