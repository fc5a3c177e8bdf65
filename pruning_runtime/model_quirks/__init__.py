"""What a stock model cannot tell about itself; one file per exception."""
