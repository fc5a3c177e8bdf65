"""The run folder: its files, and merging of profiles from several runs."""
