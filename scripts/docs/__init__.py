"""The documentation site: its configuration, hooks and generated pages."""
