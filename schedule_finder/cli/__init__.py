"""The command line ``adaptinfer-profile``."""
