"""The thin room: HTTP in, rows and doorbells out, events back."""
