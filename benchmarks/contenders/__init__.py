"""Who is compared: each streams the same answers from the same provider and keeps their text."""
