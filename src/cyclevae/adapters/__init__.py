"""Adapters to trainers of others; nothing else in the package knows one."""
