"""Parts of `make study`: what batch norm does, measured, with a report."""
