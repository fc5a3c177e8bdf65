"""What a stock model does not state in its configuration; one file per exception."""
